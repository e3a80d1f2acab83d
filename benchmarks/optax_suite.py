"""JAX: one jitted optax update, with donated state and parameters; the gradients are arguments, or computed in the step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import vsgd.optax
from benchmarks import machine
from benchmarks.shapes import Shape
from benchmarks.suite import LEARNING_RATE, WEIGHT_DECAY, Competitor, Suite


class OptaxProblem:
    """Parameters that each step replaces, with gradients of normal noise."""

    def __init__(self, shape: Shape, device: str) -> None:
        backend = jax.default_backend().replace("gpu", "cuda")
        if device != backend:
            raise ValueError(f"device is {device!r}, but must be JAX's own, {backend!r}")
        keys = jax.random.split(jax.random.key(0), len(shape.tensors))
        self.params = [jnp.ones(tensor) for tensor in shape.tensors]
        self.grads = [1e-2 * jax.random.normal(key, tensor) for key, tensor in zip(keys, shape.tensors, strict=True)]
        self.opposite = [-grad for grad in self.grads]

    def flip_gradients(self) -> None:
        self.grads, self.opposite = self.opposite, self.grads

    def make_memory(self, size: int) -> machine.Memory | OptaxMemory:
        return machine.Memory(size) if jax.default_backend() == "cpu" else OptaxMemory(size)


class OptaxMemory:
    """Two float32 arrays on an accelerator, one of which is added to the other."""

    def __init__(self, size: int) -> None:
        self.a, self.b = (jnp.ones(max(1, size // 8)) for _ in range(2))
        self.moved = 3 * self.a.nbytes
        self.add = jax.jit(jnp.add, donate_argnums=0)

    def step(self, count: int) -> None:
        for _ in range(count):
            self.a = self.add(self.a, self.b)
        self.a.block_until_ready()


#: Returns a step's gradients, given its parameters and the problem's gradients.
Gradients = Callable[[list[jax.Array], list[jax.Array]], list[jax.Array]]


def take_gradients(params: list[jax.Array], grads: list[jax.Array]) -> list[jax.Array]:
    """Return the gradients that are the step's arguments."""
    return grads


def compute_gradients(params: list[jax.Array], grads: list[jax.Array]) -> list[jax.Array]:
    """Return gradients of the parameters that, as a backward pass leaves them, are arrays in memory."""
    scale = grads[0].ravel()[0]
    # XLA would fuse a product into the update; a loop's result has its own buffer. The loop runs once.
    turns = 1 + (jnp.abs(scale) > 1e9).astype(jnp.int32)
    return jax.lax.fori_loop(0, turns, lambda _, found: [0.5 * each for each in found], [scale * each for each in params])


class OptaxArm:
    """A gradient transformation."""

    def __init__(self, problem: OptaxProblem, transformation: optax.GradientTransformation, gradients: Gradients) -> None:
        self.problem = problem
        self.optimizer_state = transformation.init(problem.params)

        @partial(jax.jit, donate_argnums=(0, 1))
        def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = transformation.update(gradients(params, grads), state, params)
            return optax.apply_updates(params, updates), state

        self.update = update

    def step(self, count: int) -> None:
        params = self.problem.params
        for _ in range(count):
            params, self.optimizer_state = self.update(params, self.optimizer_state, self.problem.grads)
        self.problem.params = params
        jax.block_until_ready((params, self.optimizer_state))

    def measure_state(self) -> list[tuple[int, int]]:
        return [(leaf.size, leaf.nbytes) for leaf in jax.tree.leaves(self.optimizer_state)]

    def measure_transient_bytes(self) -> int | None:
        compiled = self.update.lower(self.problem.params, self.optimizer_state, self.problem.grads).compile()
        analysis = compiled.memory_analysis()
        return None if analysis is None else int(analysis.temp_size_in_bytes)


_PLOTTED = ("optax.adamw", "vsgd", "constant_vsgd")
_TRANSFORMATIONS: dict[str, Callable[[], Any]] = {
    "optax.adamw": lambda: optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "optax.adabelief": lambda: optax.adabelief(LEARNING_RATE),
    "optax.lion": lambda: optax.lion(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "optax.sgd(momentum=0.9)": lambda: optax.sgd(LEARNING_RATE, momentum=0.9),
    "vsgd": lambda: vsgd.optax.vsgd(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "vsgd, bfloat16 state": lambda: vsgd.optax.vsgd(LEARNING_RATE, state_dtype="bfloat16", weight_decay=WEIGHT_DECAY),
    "constant_vsgd": lambda: vsgd.optax.constant_vsgd(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "optax.flatten(vsgd)": lambda: optax.flatten(vsgd.optax.vsgd(LEARNING_RATE, weight_decay=WEIGHT_DECAY)),
}


def _make_suite(title: str, gradients: Gradients) -> Suite:
    def make_competitor(name: str, make: Callable[[], Any]) -> Competitor:
        return Competitor(lambda problem: OptaxArm(problem, make(), gradients), plotted=name in _PLOTTED)

    return Suite(
        title=f"JAX, an optax update under `jax.jit`, {title}",
        baselines=("optax.adamw",),
        competitors={name: make_competitor(name, make) for name, make in _TRANSFORMATIONS.items()},
        make_problem=OptaxProblem,
        packages=("jax", "jaxlib", "optax", "numba"),
        imports={"vsgd.optax": ("jax", "optax")},
        memory="temp_size_in_bytes of jax's compiled.memory_analysis()",
        find_gpu=lambda: jax.devices()[0].device_kind,
    )


#: By name, as `benchmarks.catalogue` has them.
SUITES = {
    "optax": _make_suite("gradients as arguments", take_gradients),
    "optax-inside": _make_suite("gradients computed in the step", compute_gradients),
}
