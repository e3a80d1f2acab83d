"""How fast and how large a step of each optimizer is: `python -m benchmarks run SUITE`, then `python -m benchmarks report`."""
