"""Benchmarks: each script is run as ``python -m benchmarks.NAME`` from the repository's root; README.md says more."""
