"""Optimisers for fairseq."""
