"""Slow implementations that a newcomer believes at sight, and what tests and benchmarks need to compare with them."""
