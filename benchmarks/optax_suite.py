"""JAX: one jitted optax update, with donated state and parameters."""

from __future__ import annotations

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


class OptaxArm:
    """A gradient transformation."""

    def __init__(self, problem: OptaxProblem, transformation: optax.GradientTransformation) -> None:
        self.problem = problem
        self.optimizer_state = transformation.init(problem.params)

        @partial(jax.jit, donate_argnums=(0, 1))
        def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = transformation.update(grads, state, params)
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


def _make_competitor(transformation: Any, *, plotted: bool = False, **arguments: Any) -> Competitor:
    return Competitor(lambda problem: OptaxArm(problem, transformation(LEARNING_RATE, **arguments)), plotted=plotted)


def _make_decaying_competitor(transformation: Any, *, plotted: bool = False, **arguments: Any) -> Competitor:
    return _make_competitor(transformation, plotted=plotted, weight_decay=WEIGHT_DECAY, **arguments)


SUITE = Suite(
    title="JAX, an optax update under `jax.jit`",
    baselines=("optax.adamw",),
    competitors={
        "optax.adamw": _make_decaying_competitor(optax.adamw, plotted=True),
        "optax.adabelief": _make_competitor(optax.adabelief),
        "optax.lion": _make_decaying_competitor(optax.lion),
        "optax.sgd(momentum=0.9)": _make_competitor(optax.sgd, momentum=0.9),
        "vsgd": _make_decaying_competitor(vsgd.optax.vsgd, plotted=True),
        "vsgd, bfloat16 state": _make_decaying_competitor(vsgd.optax.vsgd, state_dtype="bfloat16"),
        "constant_vsgd": _make_decaying_competitor(vsgd.optax.constant_vsgd, plotted=True),
    },
    make_problem=OptaxProblem,
    packages=("jax", "jaxlib", "optax"),
    imports={"vsgd.optax": ("jax", "optax")},
    memory="temp_size_in_bytes of jax's compiled.memory_analysis()",
    find_gpu=lambda: jax.devices()[0].device_kind,
)
