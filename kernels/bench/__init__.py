"""Benchmark of the losses: `namr bench kernels`, or `python -m namr_dist.kernels.bench`.

Read `cases.py` (what is computed), `providers.py` (by whom), `gate.py` (who agrees), `measure.py`
(how it is timed).
"""
