"""Benchmarks of the product itself: real runs, searches, data, gathers."""
