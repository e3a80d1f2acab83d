"""Run the tests on every installed Keras backend, in separate processes, because a process has only one backend."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from drivers.processes import run_python

BACKENDS = ("tensorflow", "jax", "torch")
FILES = [f"tests/adapters/keras/test_keras{name}.py" for name in ("", "_training", "_monitor")]

if find_spec("keras") is None:
    pytest.skip("Keras is not installed", allow_module_level=True)


def run(backend: str, *command: str) -> subprocess.CompletedProcess[str]:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    return run_python(backend, *command)


def pass_tests(backend: str, *chosen: str) -> None:
    done = run(backend, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--require", f"keras,{backend}", "-k", "keras", *chosen)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_adapter_passes_its_tests_on(backend: str) -> None:
    if os.environ.get("KERAS_BACKEND") == backend:
        pytest.skip("this process runs them")
    # This process runs the contract on its own backend; separate environments run it on the others.
    pass_tests(backend, *FILES, "vsgd/keras", "vsgd/backends/keras.py")


@pytest.mark.slow
def test_the_adapter_passes_its_tests_on_jax_where_numbas_handler_steps_all() -> None:
    pytest.importorskip("numba")
    pass_tests("jax", "-p", "drivers.by_handler", *FILES[:2])


def test_importing_the_adapter_imports_its_backend_only() -> None:
    backend = next(filter(find_spec, ("jax", "torch")), None)
    if backend is None:
        pytest.skip("TensorFlow may import others by itself")
    done = run(backend, "-c", "import sys, vsgd.keras; print('modules', *sys.modules)")
    assert done.returncode == 0, done.stdout
    modules = done.stdout.split("modules")[-1].split()
    assert "keras" in modules
    assert not {"vsgd.torch", "vsgd.numpy", "vsgd.optax", "numba", "optax", "mlx"} & set(modules)
    assert not ({"torch", "jax"} - {backend}) & set(modules)


@pytest.mark.parametrize("lacking", ["None", "types.ModuleType('keras')"], ids=["no Keras", "Keras 2"])
def test_without_keras_3_the_adapter_names_the_extra(lacking: str) -> None:
    script = f"import sys, types; sys.modules['keras'] = {lacking}; import vsgd.keras"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "ImportError: vsgd.keras needs Keras 3: run pip install '.[keras]' in a clone of vsgd" in done.stderr


def test_without_its_backend_keras_says_so() -> None:
    script = "import sys; sys.modules['jax'] = None; import vsgd.keras"
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert "import of jax halted" in done.stderr
    assert "vsgd.keras needs" not in done.stderr
