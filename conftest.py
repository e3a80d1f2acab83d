"""Which modules can be imported for their doctests: those whose framework is installed."""

from importlib.util import find_spec

collect_ignore_glob: list[str] = []
if find_spec("torch") is None:
    collect_ignore_glob += ["vsgd/torch.py", "vsgd/backends/torch_*.py", "tests/torch_*.py"]
if find_spec("numba") is None:
    collect_ignore_glob += ["vsgd/backends/numba_*.py", "vsgd/backends/torch_fused.py"]
