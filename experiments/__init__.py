"""The evidence: the paper's experiments, and ours. `python -m experiments list` names them."""
