"""Measure the speed and memory of the optimizers' steps: `python -m benchmarks run SUITE`, then `report`."""
