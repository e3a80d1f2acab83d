"""Measure the time and memory of optimizer steps: `python -m benchmarks run SUITE`, then `python -m benchmarks report`."""
