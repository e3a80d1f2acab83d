"""Check that an installed vsgd works: `python -P release/smoke.py VERSION ADAPTER ...`.

The script needs only vsgd and the adapters' frameworks. Each adapter repeats a trajectory of the authors' code in float64.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import vsgd

_GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "defaults_f64.npz"
#: Largest allowed difference to the authors' code, relative to the largest parameter.
_TOLERANCE = 1e-10

_Arrays = list[NDArray[np.float64]]


class Trajectory(NamedTuple):
    """A run of the authors' code.

    Attributes:
        lr: the learning rate of all steps.
        start: the parameters before the first step.
        gradients: for each step, the gradient of each parameter.
        expected: for each step, the parameters after it.
    """

    lr: float
    start: _Arrays
    gradients: list[_Arrays]
    expected: list[_Arrays]


def load_trajectory() -> Trajectory:
    """Load 60 steps of two parameters at the authors' defaults."""
    arrays = np.load(_GOLDEN)
    (lr,) = set(arrays["lr"].tolist())
    gradients, expected = (
        list(map(list, zip(arrays[f"{name}_0"], arrays[f"{name}_1"], strict=True))) for name in ("grad", "param")
    )
    return Trajectory(lr, [arrays["param0_0"], arrays["param0_1"]], gradients, expected)


def _run_numpy(given: Trajectory) -> Iterator[_Arrays]:
    from vsgd.numpy import VSGD

    params = [array.copy() for array in given.start]
    optimizer = VSGD(params, lr=given.lr)
    for gradients in given.gradients:
        optimizer.step(gradients)
        yield params


def _run_torch(given: Trajectory, fused: bool) -> Iterator[_Arrays]:
    import torch

    from vsgd.torch import VSGD

    params = [torch.nn.Parameter(torch.tensor(array)) for array in given.start]
    optimizer = VSGD(params, lr=given.lr, fused=fused)
    for gradients in given.gradients:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = torch.tensor(gradient)
        optimizer.step()
        yield [param.detach().numpy() for param in params]


def _run_optax(given: Trajectory) -> Iterator[_Arrays]:
    import jax
    import optax

    from vsgd.optax import vsgd

    jax.config.update("jax_enable_x64", True)
    params = [jax.numpy.asarray(array) for array in given.start]
    solver = vsgd(given.lr)
    state = solver.init(params)
    for gradients in given.gradients:
        updates, state = solver.update(list(map(jax.numpy.asarray, gradients)), state, params)
        params = optax.apply_updates(params, updates)
        yield list(map(np.asarray, params))


def _run_keras(given: Trajectory) -> Iterator[_Arrays]:
    import keras

    from vsgd.keras import VSGD

    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    keras.config.set_floatx("float64")  # the learning rate's dtype, too
    variables = [keras.Variable(array) for array in given.start]
    optimizer = VSGD(given.lr)
    for gradients in given.gradients:
        optimizer.apply(list(map(keras.ops.convert_to_tensor, gradients)), variables)
        yield list(map(keras.ops.convert_to_numpy, variables))


def _run_mlx(given: Trajectory) -> Iterator[_Arrays]:
    import mlx.core as mx

    from vsgd.mlx import VSGD

    mx.set_default_device(mx.cpu)  # GPUs have no float64
    params = {"params": [mx.array(array, mx.float64) for array in given.start]}
    optimizer = VSGD(mx.array(given.lr, mx.float64))  # MLX stores a Python number in float32
    for gradients in given.gradients:
        params = optimizer.apply_gradients({"params": [mx.array(array, mx.float64) for array in gradients]}, params)
        yield list(map(np.array, params["params"]))


ADAPTERS: dict[str, Callable[[Trajectory], Iterator[_Arrays]]] = {
    "numpy": _run_numpy,
    "torch": partial(_run_torch, fused=False),
    "torch-fused": partial(_run_torch, fused=True),
    "optax": _run_optax,
    "keras": _run_keras,
    "mlx": _run_mlx,
}


def check_steps(name: str) -> None:
    """Check that an adapter's steps equal those of the authors' code.

    Args:
        name: a key of `ADAPTERS`.

    Raises:
        AssertionError: a parameter differs by more than the tolerance.
    """
    given = load_trajectory()
    for params, expected_params in zip(ADAPTERS[name](given), given.expected, strict=True):
        for array, expected in zip(params, expected_params, strict=True):
            np.testing.assert_allclose(array, expected, rtol=0, atol=_TOLERANCE * np.abs(expected).max(), err_msg=name)


def check_installation(version: str) -> None:
    """Check that Python imports the installed package, in the given version and with its types.

    Args:
        version: the version in the artifact's name.

    Raises:
        AssertionError: the path, the version or the file `py.typed` is wrong.
    """
    package = Path(vsgd.__file__).parent
    assert package.parent == Path(sysconfig.get_path("purelib")), f"vsgd was imported from {package}"
    assert (metadata.version("vsgd"), vsgd.__version__) == (version, version)
    assert (package / "py.typed").is_file()


def main(version: str, adapters: Sequence[str]) -> None:
    """Check the installation, then the steps of the adapters.

    Args:
        version: the version in the artifact's name.
        adapters: keys of `ADAPTERS`.
    """
    check_installation(version)
    for name in adapters:
        check_steps(name)
        print(f"{name}: follows the authors' code")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
