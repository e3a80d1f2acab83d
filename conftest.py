"""Collect doctests only of modules whose framework is installed, and select Keras's backend.

The plugin `tests/project/pages.py` runs the pages' snippets as tests.
"""

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec

pytest_plugins = ["project.pages"]

collect_ignore_glob: list[str] = ["tests/scaling/keras_*.py"]  # each runs in its own process with another Keras backend
if find_spec("torch") is None:
    collect_ignore_glob += ["vsgd/torch", "vsgd/backends/torch", "vsgd/keras/torch_optimizer.py"]
    collect_ignore_glob += ["tests/adapters/torch", "tests/scaling/torch_*.py"]
if find_spec("numba") is None:
    collect_ignore_glob += ["vsgd/backends/numba*.py", "vsgd/backends/torch/fused_cpu.py"]
if find_spec("numba") is None or sys.platform != "linux":
    collect_ignore_glob += ["vsgd/backends/xla_handler.py", "tests/adapters/optax/xla_handler_scripts.py"]
if find_spec("triton") is None or version("triton") < "3.6":
    collect_ignore_glob += ["vsgd/backends/torch/fused_cuda.py", "tests/adapters/torch/torch_interpreted.py"]
if find_spec("jax") is None or find_spec("optax") is None:
    collect_ignore_glob += ["vsgd/optax", "vsgd/backends/jax*.py", "tests/adapters/optax", "tests/scaling/jax_*.py"]
if find_spec("mlx") is None:
    collect_ignore_glob += ["vsgd/mlx.py", "tests/adapters/mlx"]
if find_spec("matplotlib") is None:
    collect_ignore_glob += ["vsgd/monitor/report.py"]
if find_spec("tqdm") is None:
    collect_ignore_glob += ["tests/research/small_comparison.py"]
if find_spec("orbax") is None:
    collect_ignore_glob += ["tests/scaling/jax_checkpoints.py"]
if find_spec("absl") is None:
    collect_ignore_glob += ["tests/adapters/optax/optax_suites.py"]

# The default backend is the first one installed; the order prefers those that load little.
_keras_backends = [name for name in ("torch", "jax", "tensorflow") if find_spec(name) is not None]
if find_spec("keras") is None or not _keras_backends:
    collect_ignore_glob += ["vsgd/keras", "vsgd/backends/keras.py", "tests/adapters/keras"]
else:
    os.environ.setdefault("KERAS_BACKEND", _keras_backends[0])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
