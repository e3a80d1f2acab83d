"""What runs inside `jax.shard_map` in the tests of sharded training: how far it strayed, or what was seen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from scaling.jax_problem import (
    GRADIENTS,
    STEPS,
    Case,
    Layout,
    Trained,
    advance,
    data_of,
    exactly,
    fresh_params,
    layout_of,
    make_step,
    place,
    reference,
    state_shardings,
    strayed,
)
from scaling.jax_sharded import HALVED

from vsgd.optax import scale_by_vsgd


def _gradient(params: Any, data: Any) -> Any:
    """Of the whole batch's loss, from what one device has."""

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(x @ params["rows"] + params["bias"])
        outputs = jax.lax.psum(jnp.einsum("bi,ijk->bk", hidden, params["mix"]), "model") @ params["out"]
        return jax.lax.pmean(((outputs + params["shift"] - y) ** 2).mean(0).sum(), "data")

    return jax.grad(loss)(params, *data)


#: What each device makes of its parameters and of what it has of a step's data, by name, and how the data are shared out.
_GRADIENTS = {"exact": exactly(_gradient), "summed": _gradient, "given": GRADIENTS["given"]}
_DATA = {"exact": P("data"), "summed": P("data"), "given": HALVED}


def _start(case: Case) -> tuple[Layout, Trained]:
    layout = layout_of(specs=HALVED)
    params = fresh_params(layout, case)
    return layout, Trained(params, case.solver().init(params))


def _train_inside(case: Case) -> Trained:
    layout, start = _start(case)
    specs = Trained(HALVED, state_shardings(case.solver(), start.params, HALVED, P()))
    step = make_step(case.solver(), _GRADIENTS[case.gradients]).__wrapped__
    mapped = jax.shard_map(step, mesh=layout.mesh, in_specs=(*specs, _DATA[case.gradients]), out_specs=specs)
    return advance(jax.jit(mapped), start, case, layout)


def inside(case: Case) -> float:
    """How far a training strayed whose whole step is inside."""
    return strayed(_train_inside(case), reference(case))


def outside(case: Case) -> float:
    """How far a training strayed of whose step the gradient alone is inside."""
    layout, start = _start(case)
    specs = {"mesh": layout.mesh, "in_specs": (HALVED, _DATA[case.gradients]), "out_specs": HALVED}
    gradient = jax.shard_map(_GRADIENTS[case.gradients], **specs)
    return strayed(advance(make_step(case.solver(), gradient), start, case, layout), reference(case))


def rounded_inside(case: Case) -> float:
    """How far a shard trained by given gradients strayed from one that is an array of its own."""
    layout, start = _start(case)
    ended = _train_inside(case)
    step = make_step(case.solver(), GRADIENTS["given"])
    device = layout.mesh.devices[0, -1]
    params = _on(device, start.params)
    alone = Trained(params, case.solver().init(params))
    for seed in range(STEPS):
        alone = step(*alone, _on(device, place(data_of(case, seed), layout, HALVED)))
    return strayed(_on(device, ended), alone)


def _on(device: Any, tree: Any) -> Any:
    """What a device has of arrays."""
    return jax.tree.map(lambda array: next(shard.data for shard in array.addressable_shards if shard.device == device), tree)


def equally_rounded(seeded: bool) -> float:
    """The share of elements that two shards of equal gradients round alike, with one seed or one for each."""
    grad = np.tile(np.random.default_rng(0).standard_normal((64, 8), np.float32), (2, 1))
    halves = np.split(np.asarray(_rounded(grad, P("model"), seeded), np.float32), 2)
    return float(np.mean(halves[0] == halves[1]))


def replicas_with_seeds_of_their_own() -> str:
    """What JAX says where an array that all devices should have alike is rounded by each in its own way."""
    try:
        _rounded(np.ones((4, 8), np.float32), P(), seeded=True)
    except ValueError as error:
        return str(error)
    return ""


def _rounded(grad: np.ndarray, spec: P, seeded: bool) -> jax.Array:
    def mean(grad: jax.Array) -> jax.Array:
        transformation = scale_by_vsgd(state_dtype="bfloat16", seed=jax.lax.axis_index("model") if seeded else 0)
        return transformation.update(grad, transformation.init(grad))[1].mu_g

    return jax.jit(jax.shard_map(mean, mesh=layout_of().mesh, in_specs=spec, out_specs=spec))(grad)
