"""Experiments: many configurations trained and evaluated alike, and what came of each."""
