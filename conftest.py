"""Which modules can be imported for their doctests: those whose framework is installed."""

from importlib.util import find_spec

collect_ignore_glob: list[str] = []
if find_spec("torch") is None:
    collect_ignore_glob += ["vsgd/torch.py", "vsgd/backends/torch_*.py", "tests/torch_*.py"]
if find_spec("numba") is None:
    collect_ignore_glob += ["vsgd/backends/numba_*.py", "vsgd/backends/torch_fused.py"]
if find_spec("jax") is None or find_spec("optax") is None:
    collect_ignore_glob += ["vsgd/optax.py"]
if any(find_spec(name) is None for name in ("jax", "optax", "absl")):
    collect_ignore_glob += ["tests/optax_*.py"]
