"""Every Keras backend that is installed, each in processes of its own, since a process has but one."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from drivers.processes import run_python

HERE = Path(__file__).parent
BACKENDS = ("tensorflow", "jax", "torch")
FILES = [f"tests/adapters/keras/test_keras{name}.py" for name in ("", "_base_class", "_training", "_monitor", "_saving")]

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
    pass_tests(backend, *FILES, "tests/contract", "vsgd/keras", "vsgd/backends/keras.py")


@pytest.mark.slow
def test_the_adapter_passes_its_tests_on_jax_where_numbas_handler_steps_all() -> None:
    pytest.importorskip("numba")
    pass_tests("jax", "-p", "drivers.by_handler", *FILES[:3])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `keras_checkpoint.py` leaves when each installed backend saves a model, and each continues all of them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    installed = list(filter(find_spec, BACKENDS))
    for command in ("save", "continue"):
        call = (str(HERE / "keras_checkpoint.py"), command, str(folder))
        with ThreadPoolExecutor() as pool:
            processes = [pool.submit(run, backend, *call) for backend in installed]
        for process in processes:
            assert process.result().returncode == 0, process.result().stdout
    return folder


# Where another backend's last digit tips a rounding of the state, what follows differs by a part of its 256.
@pytest.mark.parametrize(("suffix", "tolerance"), [("", 5e-6), ("-bfloat16", 2e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reader", BACKENDS)
@pytest.mark.parametrize("saver", BACKENDS)
def test_a_model_saved_on_one_backend_continues_on_another(
    saver: str, reader: str, suffix: str, tolerance: float, checkpoints: Path
) -> None:
    missing = [name for name in (saver, reader) if find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")

    def load(name: str) -> list[np.ndarray]:
        with np.load(checkpoints / f"{saver}{suffix}{name}.npz") as arrays:
            return [arrays[str(i)] for i in range(len(arrays))]

    saved, read = load(""), load(f"-read-by-{reader}")
    assert len(saved) == len(read) == 2 + 2 + 6  # weights; iterations and learning rate; state
    for before, after in zip(saved, read, strict=True):
        np.testing.assert_array_equal(after, before)
    for index, (own, other, start) in enumerate(zip(load("-goes-on"), load(f"-on-{reader}"), saved, strict=True)):
        assert own.dtype.kind == other.dtype.kind
        if saver == reader:
            np.testing.assert_array_equal(other, own)
        else:
            # Each backend sums in its own order: 20 steps of float32's rounding, 6e-8 of the largest element. 6e-7 was seen.
            np.testing.assert_allclose(other, own, rtol=0, atol=tolerance * np.abs(own).max())
        assert index == 3 or not np.array_equal(own, start)  # all but the learning rate moved


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
