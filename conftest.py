"""Which modules can be imported for their doctests: those whose framework is installed; and which backend Keras runs on.

The pages' snippets are tests by a plugin, `tests/pages.py`.
"""

import os
from importlib.util import find_spec

pytest_plugins = ["pages"]

collect_ignore_glob: list[str] = ["tests/scaling/keras_*.py"]  # each of a process with its own Keras backend
if find_spec("torch") is None:
    collect_ignore_glob += ["vsgd/torch", "vsgd/backends/torch", "tests/torch_*.py", "tests/scaling/torch_*.py"]
if find_spec("numba") is None:
    collect_ignore_glob += ["vsgd/backends/numba*.py", "vsgd/backends/torch/fused_cpu.py"]
if find_spec("triton") is None:
    collect_ignore_glob += ["vsgd/backends/torch/fused_cuda.py", "tests/torch_interpreted.py"]
if find_spec("jax") is None or find_spec("optax") is None:
    collect_ignore_glob += ["vsgd/optax", "vsgd/backends/jax.py", "tests/scaling/jax_*.py"]
if find_spec("mlx") is None:
    collect_ignore_glob += ["vsgd/mlx.py"]
if find_spec("tqdm") is None:
    collect_ignore_glob += ["tests/small_comparison.py"]
if find_spec("orbax") is None:
    collect_ignore_glob += ["tests/scaling/jax_checkpoints.py"]
if any(find_spec(name) is None for name in ("jax", "optax", "absl")):
    collect_ignore_glob += ["tests/optax_*.py"]

# Where the user names none: the first that is installed, in the order of how little else it loads.
_keras_backends = [name for name in ("torch", "jax", "tensorflow") if find_spec(name) is not None]
if find_spec("keras") is None or not _keras_backends:
    collect_ignore_glob += ["vsgd/keras", "vsgd/backends/keras.py", "tests/keras_*.py"]
else:
    os.environ.setdefault("KERAS_BACKEND", _keras_backends[0])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
