"""Shared by `benchmarks/` and `experiments/`: Markdown pages, the machine's description, and the examples as modules."""
