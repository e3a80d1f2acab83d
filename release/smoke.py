"""Whether an installed vsgd works: `python -P release/smoke.py VERSION ADAPTER ...`.

It needs nothing but what is to be tried out. Each adapter takes the steps of a golden trajectory, of the authors' code, in
float64.
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
#: What every adapter holds to the authors' code in float64.
_TOLERANCE = 1e-10

_Arrays = list[NDArray[np.float64]]


class Trajectory(NamedTuple):
    """What the authors' code did with given gradients.

    Attributes:
        lr: the step size, of all steps.
        start: the parameters before the first step.
        gradients: at each step those of each parameter.
        expected: the parameters after each step.
    """

    lr: float
    start: _Arrays
    gradients: list[_Arrays]
    expected: list[_Arrays]


def golden() -> Trajectory:
    """60 steps of two parameters, at the authors' defaults."""
    arrays = np.load(_GOLDEN)
    (lr,) = set(arrays["lr"].tolist())
    gradients, expected = (
        list(map(list, zip(arrays[f"{name}_0"], arrays[f"{name}_1"], strict=True))) for name in ("grad", "param")
    )
    return Trajectory(lr, [arrays["param0_0"], arrays["param0_1"]], gradients, expected)


def _numpy(given: Trajectory) -> Iterator[_Arrays]:
    from vsgd.numpy import VSGD

    params = [array.copy() for array in given.start]
    optimizer = VSGD(params, lr=given.lr)
    for gradients in given.gradients:
        optimizer.step(gradients)
        yield params


def _torch(given: Trajectory, fused: bool) -> Iterator[_Arrays]:
    import torch

    from vsgd.torch import VSGD

    params = [torch.nn.Parameter(torch.tensor(array)) for array in given.start]
    optimizer = VSGD(params, lr=given.lr, fused=fused)
    for gradients in given.gradients:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = torch.tensor(gradient)
        optimizer.step()
        yield [param.detach().numpy() for param in params]


def _optax(given: Trajectory) -> Iterator[_Arrays]:
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


def _keras(given: Trajectory) -> Iterator[_Arrays]:
    import keras

    from vsgd.keras import VSGD

    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    keras.config.set_floatx("float64")  # also of the learning rate
    variables = [keras.Variable(array) for array in given.start]
    optimizer = VSGD(given.lr)
    for gradients in given.gradients:
        optimizer.apply(list(map(keras.ops.convert_to_tensor, gradients)), variables)
        yield list(map(keras.ops.convert_to_numpy, variables))


def _mlx(given: Trajectory) -> Iterator[_Arrays]:
    import mlx.core as mx

    from vsgd.mlx import VSGD

    mx.set_default_device(mx.cpu)  # GPUs have no float64
    params = {"params": [mx.array(array, mx.float64) for array in given.start]}
    optimizer = VSGD(mx.array(given.lr, mx.float64))  # a number would be kept in float32
    for gradients in given.gradients:
        params = optimizer.apply_gradients({"params": [mx.array(array, mx.float64) for array in gradients]}, params)
        yield list(map(np.array, params["params"]))


ADAPTERS: dict[str, Callable[[Trajectory], Iterator[_Arrays]]] = {
    "numpy": _numpy,
    "torch": partial(_torch, fused=False),
    "torch-fused": partial(_torch, fused=True),
    "optax": _optax,
    "keras": _keras,
    "mlx": _mlx,
}


def check_steps(name: str) -> None:
    """That an adapter follows the authors' code.

    Args:
        name: of `ADAPTERS`.

    Raises:
        AssertionError: it strays.
    """
    given = golden()
    for ours, theirs in zip(ADAPTERS[name](given), given.expected, strict=True):
        for array, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(array, expected, rtol=0, atol=_TOLERANCE * np.abs(expected).max(), err_msg=name)


def check_installation(version: str) -> None:
    """That what is imported is what was installed, with its types.

    Args:
        version: as in the name of what was installed.

    Raises:
        AssertionError: it is not.
    """
    package = Path(vsgd.__file__).parent
    assert package.parent == Path(sysconfig.get_path("purelib")), f"vsgd was imported from {package}"
    assert (metadata.version("vsgd"), vsgd.__version__) == (version, version)
    assert (package / "py.typed").is_file()


def main(version: str, adapters: Sequence[str]) -> None:
    """Check the installation, then the steps of the adapters.

    Args:
        version: as in the name of what was installed.
        adapters: of `ADAPTERS`.
    """
    check_installation(version)
    for name in adapters:
        check_steps(name)
        print(f"{name}: follows the authors' code")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
