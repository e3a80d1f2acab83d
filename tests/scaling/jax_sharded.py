"""What runs on a mesh of devices in the tests of sharded training: how far it strayed from one device, or what was seen."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from scaling.jax_problem import (
    GRADIENTS,
    STEPS,
    Case,
    Layout,
    Trained,
    advance,
    data_of,
    fresh_params,
    gradient_of,
    layout_of,
    make_step,
    place,
    reference,
    state_shardings,
    strayed,
)

import vsgd.optax
from vsgd.optax.state import get_arrays


def trained(case: Case, types: str = "Auto") -> float:
    """How far a training strayed whose state lies as the parameters do after each step."""
    layout = layout_of(types=types)
    with layout.entered():
        params = fresh_params(layout, case)
        now = Trained(params, case.solver().init(params))
        step = make_step(case.solver(), gradient_of(case, layout))
        for seed in range(STEPS):
            now = advance(step, now, case, layout, [seed])
            assert all(lie_as_told(tree, layout) for tree in (now.params, *get_arrays(now.state[0])))
    return strayed(now, reference(case))


def lie_as_told(tree: dict[str, jax.Array], layout: Layout) -> bool:
    shardings = layout.shardings(layout.specs)
    return all(leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim) for name, leaf in tree.items())


def collectives(function: Any, *args: Any, **options: Any) -> list[str]:
    """What a compiled function communicates by."""
    text = jax.jit(function, **options).lower(*args).compile().as_text()
    return sorted(re.findall(r" (all-[a-z-]+|reduce-scatter|collective-[a-z-]+)[(]", text))


def communication(case: Case) -> dict[str, list[str]]:
    """What a step communicates by on gradients that are there, and what a training does, beside its gradients alone."""
    layout, solver = layout_of(), case.solver()
    injected = optax.inject_hyperparams(getattr(vsgd.optax, case.kind))(0.05, weight_decay=0.1)
    params, data = fresh_params(layout, case), place(data_of(case, 0), layout, P("data"))
    gradient = gradient_of(case, layout)
    return {
        "step": collectives(_stepping(solver), params, solver.init(params), params),
        "step, injected": collectives(_stepping(injected), params, injected.init(params), params),
        "training": collectives(make_step(solver, gradient).__wrapped__, params, solver.init(params), data),
        "gradients": collectives(gradient, params, data, out_shardings=layout.shardings(layout.specs)),
    }


def _stepping(solver: Any) -> Any:
    """A step on gradients that are there."""
    return make_step(solver, GRADIENTS["given"]).__wrapped__


# --- ZeRO-1. ---

#: Whole along the data's axis; and the state sharded along it, where a dimension is left that it divides.
HALVED = {"rows": P(None, "model"), "bias": P("model"), "mix": P("model"), "out": P(), "shift": P()}
SPREAD = {**HALVED, "rows": P("data", "model"), "mix": P("model", None, "data"), "out": P("data")}


class Zero(NamedTuple):
    """What was seen of ZeRO-1.

    Attributes:
        strayed: how far it did.
        here: bytes of the state on each device.
        update: what the update communicates by, on gradients that are there.
    """

    strayed: float
    here: list[int]
    update: list[str]


def zero(case: Case) -> Zero:
    """Parameters whole along the data's axis, the state sharded along it."""
    layout, solver = layout_of(specs=HALVED), case.solver()
    params = fresh_params(layout, case)
    shardings = Trained(
        layout.shardings(HALVED), state_shardings(solver, params, layout.shardings(SPREAD), layout.shardings(P()))
    )
    now = Trained(params, jax.jit(solver.init, out_shardings=shardings.state)(params))
    step = make_step(solver, gradient_of(case, layout), out_shardings=shardings, donate_argnums=(0, 1))
    now = advance(step, now, case, layout)
    assert lie_as_told(now.params, layout)
    return Zero(
        strayed(now, reference(case)),
        [sum(_bytes_on(device, leaf) for leaf in jax.tree.leaves(now.state)) for device in layout.mesh.devices.flat],
        collectives(_stepping(solver), *now, now.params, out_shardings=shardings),
    )


def _bytes_on(device: Any, array: jax.Array) -> int:
    return sum(shard.data.nbytes for shard in array.addressable_shards if shard.device == device)


# --- Where `init` puts the state. ---


def placed_by_init() -> dict[str, str]:
    """Where the state of sharded parameters lies, by how `init` is called."""
    layout, case = layout_of(), Case()
    solver, params = case.solver(), fresh_params(layout, case)
    whole = layout.shardings(P())
    told = state_shardings(solver, params, layout.shardings(layout.specs), whole)
    found = {
        "init(params)": solver.init(params),
        "jit(init)(params)": jax.jit(solver.init)(params),
        "jit(init, out_shardings=...)(params)": jax.jit(solver.init, out_shardings=told)(params),
    }
    with jax.set_mesh(layout.mesh):
        found["jit(init)(params), in jax.set_mesh"] = jax.jit(solver.init)(params)
    explicit = layout_of(types="Explicit")
    with explicit.entered():
        params = fresh_params(explicit, case)
        found["jit(init)(params), explicit axes"] = jax.jit(solver.init)(params)
        assert jax.tree.map(jax.typeof, found["jit(init)(params), explicit axes"]) == jax.tree.map(
            jax.typeof, solver.init(params)
        )
    return {how: ", ".join(sorted({_place(tree, layout) for tree in get_arrays(state[0])})) for how, state in found.items()}


def _place(tree: dict[str, jax.Array], layout: Layout) -> str:
    if lie_as_told(tree, layout):
        return "as the parameters"
    if lie_as_told(tree, layout._replace(specs=dict.fromkeys(tree, P()))):
        return "whole on all devices"
    assert {leaf.sharding.device_set == {jax.devices()[0]} for leaf in tree.values()} == {True}
    return "on the first device"


def uneven() -> str:
    """What JAX says of 7 rows for 4 devices."""
    layout = layout_of(4, 2)
    try:
        place({"rows": np.zeros((7, 3))}, layout, {"rows": P("data")})
    except ValueError as error:
        return str(error)
    return ""


def lying(kind: str, dtype: str, types: str) -> list[bool]:
    """For each array of state and updates whether it lies as its parameter, of three dimensions; eager, compiled, injected."""
    layout = layout_of(8, 1, types=types, specs={"cube": P(None, "data")})
    make = getattr(vsgd.optax, kind)
    arrays = []
    with layout.entered():
        params = place({"cube": np.ones((2, 8, 4), dtype)}, layout, layout.specs)
        for solver in (make(0.1, weight_decay=0.1), optax.inject_hyperparams(make)(0.1, weight_decay=0.1)):
            state = solver.init(params)
            arrays += jax.tree.leaves(
                (state, solver.update(params, state, params), jax.jit(solver.update)(params, state, params))
            )
    return [lie_as_told({"cube": array}, layout) for array in arrays if array.ndim]
