"""Benchmarks of the ops: `python -m namr_dist.kernels.bench`."""
