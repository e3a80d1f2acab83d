"""A small network, trained on a mesh of devices or on one device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from scaling.compare import apart

import vsgd.optax

STEPS = 4
#: If 4 devices share 12 numbers, each has 3.
SHAPES = {"rows": (8, 12), "bias": (12,), "mix": (12, 3, 8), "out": (8, 6), "shift": (6,)}
#: Sharded by both axes of the mesh, by one axis, in one dimension by both axes, and not at all.
SPECS = {"rows": P("data", "model"), "bias": P("model"), "mix": P("model", None, "data"), "out": P(("data", "model"))}
SPECS |= {"shift": P()}

#: By `Case.gradients`: ten times the deviation of two runs on one device, one of them with each gradient's next larger number.
BOUND = {
    "given": {"float32": 5e-6, "float64": 1e-14},
    "summed": {"float32": 1.5e-5, "float64": 2e-14},
}


class Case(NamedTuple):
    """What is trained, and how.

    Attributes:
        kind: the function that makes the optimizer.
        dtype: the parameters' dtype.
        compact: whether state and parameters are rounded stochastically to bfloat16, where possible.
        gradients: the source of the gradients, by name.
        types: the types of the mesh's axes.
        auto: whether the first gradient calibrates the run.
    """

    kind: str = "vsgd"
    dtype: str = "float32"
    compact: bool = False
    gradients: str = "exact"
    types: str = "Auto"
    auto: bool = False

    def solver(self) -> Any:
        calibration = {"prior_strength": "auto"} if self.auto else {}
        compact = {"state_dtype": "bfloat16", "stochastic_rounding": True} if self.compact else {}
        return getattr(vsgd.optax, self.kind)(0.05, weight_decay=0.1, **calibration, **compact)


class Trained(NamedTuple):
    """Parameters, and the optimizer's state."""

    params: dict[str, jax.Array]
    state: Any


class Layout(NamedTuple):
    """The mesh, and how parameters are sharded on it."""

    mesh: Mesh
    specs: dict[str, P] = SPECS

    def shardings(self, specs: Any) -> Any:
        return jax.tree.map(partial(NamedSharding, self.mesh), specs, is_leaf=lambda leaf: isinstance(leaf, P))

    @property
    def explicit(self) -> bool:
        return AxisType.Explicit in self.mesh.axis_types

    def entered(self) -> AbstractContextManager[Any]:
        return jax.set_mesh(self.mesh) if self.explicit else nullcontext()


def layout_of(*shape: int, types: str = "Auto", specs: dict[str, P] = SPECS) -> Layout:
    """Return a layout on a mesh of this shape.

    The default mesh has as many devices as can share all dimensions, in rows of two if there is more than one.
    """
    if not shape:
        count = next(number for number in (8, 4, 2, 1) if number <= jax.device_count())
        shape = (count // 2, 2) if count > 1 else (1, 1)
    devices = jax.devices()[: math.prod(shape)]
    return Layout(jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType[types],) * 2, devices=devices), specs)


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["rows"] + params["bias"])
    outputs = jnp.einsum("bi,ijk->bk", hidden, params["mix"]) @ params["out"]
    return ((outputs + params["shift"] - y) ** 2).mean(0).sum()


def of_batch(params: Any, data: Any) -> Any:
    return jax.grad(loss)(params, *data)


def of_few_digits(params: Any, data: Any) -> Any:
    """Return gradients for weights of few digits: in float64 all sums of their products are exact, in any order."""
    return of_batch(jax.tree.map(lambda param: jnp.round(param.astype(jnp.float64) * 8) / 8, params), data)


#: Functions of the parameters and of the data that a step places on the devices.
GRADIENTS: dict[str, Callable[..., Any]] = {
    "exact": of_few_digits,
    "summed": of_batch,
    "given": lambda params, data: data,
}


def data_of(case: Case, seed: int) -> Any:
    """Return a step's data: small integers, rounded numbers, or the gradients themselves."""
    rng = np.random.default_rng(seed + 1)
    if case.gradients == "given":
        return {name: _normal(rng, shape, case.dtype) for name, shape in SHAPES.items()}
    if case.gradients == "summed":
        return _normal(rng, (16, 8), case.dtype), _normal(rng, (16, 6), case.dtype)
    return rng.integers(-2, 3, (16, 8)).astype(np.float64), rng.integers(-2, 3, (16, 6)).astype(np.float64)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    real, imaginary = rng.standard_normal((2, *shape))
    return (real + 1j * imaginary if dtype.startswith("complex") else real).astype(dtype)


def place(tree: Any, layout: Layout | None, specs: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree) if layout is None else jax.device_put(tree, layout.shardings(specs))


def fresh(case: Case, layout: Layout | None) -> Trained:
    """Return parameters, and the state that `init` makes for them."""
    rng = np.random.default_rng(0)
    values = {name: _normal(rng, shape, case.dtype) / np.asarray(2, case.dtype) for name, shape in SHAPES.items()}
    with layout.entered() if layout else nullcontext():
        params = place(values, layout, layout and layout.specs)
        return Trained(params, case.solver().init(params))


def state_shardings(solver: Any, params: Any, shardings: Any, whole: Any) -> Any:
    """Return the sharding of each array of the state: that of its parameter, or for the count, `whole`."""

    def of_param(_: Any, sharding: Any) -> Any:
        return sharding

    state = jax.eval_shape(solver.init, params)
    return optax.tree_utils.tree_map_params(solver, of_param, state, shardings, transform_non_params=lambda _: whole)


def make_step(solver: Any, gradient: Callable[..., Any], **options: Any) -> Any:
    @partial(jax.jit, **options)
    def step(params: Any, state: Any, data: Any) -> Trained:
        grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), gradient(params, data), params)
        updates, state = solver.update(grads, state, params)
        return Trained(optax.apply_updates(params, updates), state)

    return step


def gradient_of(case: Case, layout: Layout | None) -> Callable[..., Any]:
    """Return gradients sharded like the parameters; if types state the sharding, the compiler shards the sums."""
    gradient = GRADIENTS[case.gradients]
    if layout is None or not layout.explicit or case.gradients == "given":
        return gradient
    return jax.sharding.auto_axes(gradient, axes=layout.mesh.axis_names, out_sharding=layout.shardings(layout.specs))


def advance(step: Any, trained: Trained, case: Case, layout: Layout | None, seeds: Iterable[int] = range(STEPS)) -> Trained:
    for seed in seeds:
        specs = layout and (layout.specs if case.gradients == "given" else P("data"))
        trained = step(*trained, place(data_of(case, seed), layout, specs))
    return trained


@cache
def reference(case: Case, steps: int = STEPS) -> Trained:
    """Run the same training on one device."""
    with jax.default_device(jax.local_devices()[0]):
        step = make_step(case.solver(), gradient_of(case, None))
        return advance(step, fresh(case, None), case, None, range(steps))


def strayed(one: Any, other: Any) -> float:
    """Return the largest difference of a shard from its part of a whole array, relative to the array's largest value."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return max(map(_apart, jax.tree.leaves(one), jax.tree.leaves(other)))


def _apart(sharded: jax.Array, whole: jax.Array) -> float:
    if sharded.shape != whole.shape:
        return math.inf
    values = np.asarray(whole)
    return max(apart(np.asarray(shard.data), values[shard.index], values) for shard in sharded.addressable_shards)
