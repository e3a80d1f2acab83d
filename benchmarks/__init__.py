"""Measure the time and memory of each optimizer's step: `python -m benchmarks run SUITE`, then `python -m benchmarks report`."""
