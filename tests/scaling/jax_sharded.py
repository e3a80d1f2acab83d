"""Train on a mesh of devices in the tests of sharded training, and return the deviation from one device, or observations."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from scaling import jax_problem as problem

import vsgd.optax
from vsgd.optax.state import get_arrays

#: HALVED does not shard along the data's axis; SPREAD shards the state along it, where it divides a remaining dimension.
HALVED = {"rows": P(None, "model"), "bias": P("model"), "mix": P("model"), "out": P(), "shift": P()}
SPREAD = {**HALVED, "rows": P("data", "model"), "mix": P("model", None, "data"), "out": P("data")}


def trained(case: problem.Case) -> float:
    """Return a training's deviation; assert that eager, compiled and injected state and updates lie like the parameters."""
    layout = problem.layout_of(types=case.types)
    with layout.entered():
        now = problem.fresh(case, layout)
        eager = optax.inject_hyperparams(getattr(vsgd.optax, case.kind))(0.05)
        start = eager.init(now.params)
        updates, state = eager.update(now.params, start, now.params)
        states = [now.state, start.inner_state, state.inner_state]
        assert all(lie_as_told(tree, layout) for tree in (updates, *(tree for each in states for tree in get_arrays(each[0]))))
        if layout.explicit:  # with other types the compiler places the state freely
            assert all(lie_as_told(tree, layout) for tree in get_arrays(jax.jit(case.solver().init)(now.params)[0]))
        step = problem.make_step(case.solver(), problem.gradient_of(case, layout))
        for seed in range(problem.STEPS):
            now = problem.advance(step, now, case, layout, [seed])
            assert all(lie_as_told(tree, layout) for tree in (now.params, *get_arrays(now.state[0])))
    return problem.strayed(now, problem.reference(case._replace(types="Auto")))


def lie_as_told(tree: dict[str, jax.Array], layout: problem.Layout) -> bool:
    shardings = layout.shardings(layout.specs)
    return all(leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim) for name, leaf in tree.items())


def collectives(function: Any, *args: Any, **options: Any) -> list[str]:
    """Return the collectives of a compiled function."""
    text = jax.jit(function, **options).lower(*args).compile().as_text()
    return sorted(re.findall(r" (all-[a-z-]+|reduce-scatter|collective-[a-z-]+)[(]", text))


def communication(case: problem.Case) -> dict[str, list[str]]:
    """Return the collectives of a step on given gradients, of a training, and of its gradients alone."""
    layout, solver = problem.layout_of(), case.solver()
    injected = optax.inject_hyperparams(getattr(vsgd.optax, case.kind))(0.05, weight_decay=0.1)
    params, state = problem.fresh(case, layout)
    data, gradient = problem.place(problem.data_of(case, 0), layout, P("data")), problem.gradient_of(case, layout)
    return {
        "step": collectives(_stepping(solver), params, state, params),
        "step, injected": collectives(_stepping(injected), params, injected.init(params), params),
        "training": collectives(problem.make_step(solver, gradient).__wrapped__, params, state, data),
        "gradients": collectives(gradient, params, data, out_shardings=layout.shardings(layout.specs)),
    }


def _stepping(solver: Any) -> Any:
    """Return a step on given gradients."""
    return problem.make_step(solver, problem.GRADIENTS["given"]).__wrapped__


def zero(case: problem.Case) -> float:
    """Return the deviation of ZeRO-1, with parameters whole along the data's axis, and the state shared along it."""
    layout, solver = problem.layout_of(specs=HALVED), case.solver()
    params, _ = problem.fresh(case, layout)
    halved, spread = layout.shardings(HALVED), layout.shardings(SPREAD)
    shardings = problem.Trained(halved, problem.state_shardings(solver, params, spread, layout.shardings(P())))
    now = problem.Trained(params, jax.jit(solver.init, out_shardings=shardings.state)(params))
    step = problem.make_step(solver, problem.gradient_of(case, layout), out_shardings=shardings, donate_argnums=(0, 1))
    now = problem.advance(step, now, case, layout)
    assert lie_as_told(now.params, layout)
    share = sum(math.prod(spread[name].shard_shape(shape)) for name, shape in problem.SHAPES.items())
    size = len(get_arrays(now.state[0])) * share * now.state[0].mu_g["out"].dtype.itemsize
    shards = [shard for leaf in jax.tree.leaves(now.state) for shard in leaf.addressable_shards]
    for device in layout.mesh.local_devices:
        # The additional bytes are the count and two scales.
        assert sum(shard.data.nbytes for shard in shards if shard.device == device) == size + 4 + 2 * 4
    assert set(collectives(_stepping(solver), *now, now.params, out_shardings=shardings)) <= {"all-gather"}
    return problem.strayed(now, problem.reference(case))


# --- shard_map, with given gradients. ---


def inside(case: problem.Case) -> float:
    """Return the deviation of a training whose whole step is inside `shard_map`."""
    layout = problem.layout_of(specs=HALVED)
    start = problem.fresh(case, layout)
    specs = problem.Trained(HALVED, problem.state_shardings(case.solver(), start.params, HALVED, P()))
    mapped = jax.shard_map(_stepping(case.solver()), mesh=layout.mesh, in_specs=(*specs, HALVED), out_specs=specs)
    return problem.strayed(problem.advance(jax.jit(mapped), start, case, layout), problem.reference(case))


def outside(case: problem.Case) -> float:
    """Return the deviation of a training whose gradient alone is inside `shard_map`."""
    layout = problem.layout_of(specs=HALVED)
    gradient = jax.shard_map(problem.GRADIENTS["given"], mesh=layout.mesh, in_specs=(HALVED, HALVED), out_specs=HALVED)
    step = problem.make_step(case.solver(), gradient)
    return problem.strayed(problem.advance(step, problem.fresh(case, layout), case, layout), problem.reference(case))


def strength(case: problem.Case) -> float:
    """Return the relative difference of the prior strengths of sharded gradients and of the same gradients on one device."""
    sharded, whole = problem.fresh(case, problem.layout_of()).params, problem.reference(case, 0).params
    assert len(sharded["rows"].sharding.device_set) > 1
    return abs(vsgd.optax.prior_strength_from([sharded]) / vsgd.optax.prior_strength_from([whole]) - 1)


def equally_rounded() -> list[float]:
    """Return the share of elements that two shards of equal gradients round alike, with one seed and with one per shard."""
    grad = np.random.default_rng(0).standard_normal((64, 8), np.float32)

    def mean(grad: jax.Array, seeded: bool = False) -> jax.Array:
        seed = jax.lax.axis_index("model") if seeded else 0
        transformation = vsgd.optax.scale_by_vsgd(state_dtype="bfloat16", seed=seed)
        return transformation.update(grad, transformation.init(grad))[1].mu_g

    def rounded(spec: P, seeded: bool) -> list[np.ndarray]:
        mapped = jax.shard_map(lambda shard: mean(shard, seeded), mesh=problem.layout_of().mesh, in_specs=spec, out_specs=spec)
        return np.split(np.asarray(jax.jit(mapped)(np.tile(grad, (2, 1))), np.float32), 2)

    # Each shard is rounded like a separate array.
    np.testing.assert_array_equal(rounded(P("model"), False)[0], np.asarray(jax.jit(mean)(grad), np.float32))
    # Devices with different seeds may not round what must be equal on all of them.
    with pytest.raises(ValueError, match="out_specs"):
        rounded(P(), True)
    return [float(np.mean(np.equal(*rounded(P("model"), seeded)))) for seeded in (False, True)]


def observed(mapped: bool) -> float:
    """Return the relative deviation of the posterior of sharded gradients, observed by each device or sharded by XLA."""
    layout = problem.layout_of()
    solver = vsgd.optax.observe_gradients()
    grads = [np.random.default_rng(seed).standard_normal((8, 16)).astype(np.float32) for seed in range(5)]
    spec = P("data", "model")

    def run(grads: list[jax.Array]) -> Any:
        state = solver.init(grads[0])
        for grad in grads:
            _, state = solver.update(grad, state)
        return tuple(vsgd.optax.posterior(state))

    whole = run(list(map(jax.numpy.asarray, grads)))
    placed = [jax.device_put(grad, jax.sharding.NamedSharding(layout.mesh, spec)) for grad in grads]
    sharded = jax.shard_map(run, mesh=layout.mesh, in_specs=(spec,), out_specs=spec) if mapped else run
    found = jax.jit(sharded)(placed)
    return max(
        float(np.max(np.abs(np.asarray(ours) / np.asarray(theirs) - 1))) for ours, theirs in zip(found, whole, strict=True)
    )
