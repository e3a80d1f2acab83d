"""The paper's experiments and a comparison on small tasks; `python -m experiments list` names them."""
