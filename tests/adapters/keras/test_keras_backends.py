"""Every Keras backend that is installed, each in processes of its own, since a process has but one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from drivers.processes import run_python

HERE = Path(__file__).parent
BACKENDS = ("tensorflow", "jax", "torch")
FILES = (
    *(
        f"tests/adapters/keras/test_keras{name}.py"
        for name in ("", "_base_class", "_compact", "_monitor", "_prior", "_saving", "_training")
    ),
    "tests/contract/test_compact.py",
    "vsgd/keras",
    "vsgd/backends/keras.py",
)

if find_spec("keras") is None:
    pytest.skip("Keras is not installed", allow_module_level=True)


def run(backend: str, *command: str) -> subprocess.CompletedProcess[str]:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    return run_python(backend, *command)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_adapter_passes_its_tests_on(backend: str) -> None:
    if os.environ.get("KERAS_BACKEND") == backend:
        pytest.skip("this process runs them")
    done = run(backend, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--require", f"keras,{backend}", "-k", "keras", *FILES)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


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


def test_sharded_rounding_equals_whole_without_communication_on_jax() -> None:
    script = """
        import os
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
        import re
        import jax, keras, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from adapters.keras.keras_problems import make
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
        shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("x", "y"), ("y",), (None, "y", "x"))]
        variables = [keras.Variable(np.ones(shape), dtype="bfloat16") for shape in ((16, 8), (6,), (3, 4, 8))]
        optimizer = make("VSGD", lr=0.1, weight_decay=0.1, state_dtype="bfloat16", stochastic_rounding=True)
        optimizer.build(variables)
        rng = np.random.default_rng(0)
        grads = [[rng.standard_normal(each.shape, np.float32) for each in variables] for _ in range(10)]

        def run(place):
            params = place([each.value for each in variables])
            scalars, *states = [each.value for each in optimizer.variables[:2]], *optimizer.variables[2:]
            by_variable = [[each.value for each in states[i : i + 3]] for i in range(0, 9, 3)]
            placed = zip(*map(place, zip(*by_variable, strict=True)), strict=True)
            state = [*scalars, *(each for of_one in placed for each in of_one)]
            step = jax.jit(optimizer.stateless_apply).lower(state, place(grads[0]), params).compile()
            for each in grads:
                params, state = step(state, place(each), params)
            return [*params, *state], step.as_text()

        whole, _ = run(lambda arrays: [jax.numpy.asarray(each) for each in arrays])
        sharded, text = run(lambda arrays: [jax.device_put(each, to) for each, to in zip(arrays, shardings, strict=True)])
        assert not re.findall(r" (all-[a-z-]+|reduce-scatter|collective-[a-z-]+)[(]", text)
        assert all(each.sharding.is_equivalent_to(to, each.ndim) for each, to in zip(sharded, shardings))
        for ours, theirs in zip(sharded, whole, strict=True):
            assert ours.dtype == theirs.dtype and (np.asarray(ours) == np.asarray(theirs)).all()
        print("done", {each.dtype.name for each in sharded[5:]})
    """
    done = run("jax", "-c", textwrap.dedent(script))
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "done {'bfloat16'}"
