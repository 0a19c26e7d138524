"""Criterions for fairseq."""
