"""Save with orbax and load in the tests of sharded training, and return the deviation from one device."""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P
from scaling import jax_problem as problem

from vsgd.optax import ScaleByVsgdState

BEFORE, AFTER = range(3), range(3, 6)  # the seeds of a training's data before and after the checkpoint


def save(case: problem.Case, folder: str) -> float:
    """Save a training while it continues in the same memory, and return the deviation of the continued training."""
    layout = problem.layout_of()
    step = problem.make_step(case.solver(), problem.gradient_of(case, layout), donate_argnums=(0, 1))
    trained = problem.advance(step, problem.fresh(case, layout), case, layout, BEFORE)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, trained)
        trained = problem.advance(step, trained, case, layout, AFTER)
    return problem.strayed(trained, problem.reference(case, AFTER.stop))


def load(case: problem.Case, folder: str, *shape: int) -> float:
    """Load on a mesh, and return the largest deviation, after loading and after some more steps."""
    layout = problem.layout_of(*shape)
    with ocp.StandardCheckpointer() as checkpointer:
        trained = checkpointer.restore(folder, _target_of(case, layout))
    return _continued(trained, case, layout)


def _continued(trained: problem.Trained, case: problem.Case, layout: problem.Layout) -> float:
    loaded = problem.strayed(trained, problem.reference(case, BEFORE.stop))
    trained = problem.advance(problem.make_step(case.solver(), problem.gradient_of(case, layout)), trained, case, layout, AFTER)
    return max(loaded, problem.strayed(trained, problem.reference(case, AFTER.stop)))


def _target_of(case: problem.Case, layout: problem.Layout) -> problem.Trained:
    """Return shapes, dtypes and shardings of what is to be loaded, without numbers."""
    shardings, whole = layout.shardings(layout.specs), layout.shardings(P())
    params = {name: jax.ShapeDtypeStruct(problem.SHAPES[name], case.dtype, sharding=shardings[name]) for name in problem.SHAPES}
    state = jax.eval_shape(case.solver().init, params)
    return problem.Trained(
        params, jax.tree.map(_placed, state, problem.state_shardings(case.solver(), params, shardings, whole))
    )


def _placed(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def load_otherwise(case: problem.Case, folder: str) -> float:
    """Return the deviation of a state loaded without a target, once it has its type; assert that one loaded by arrays fails."""
    layout = problem.layout_of()
    params, state = target = problem.fresh(case, layout)
    with ocp.StandardCheckpointer() as checkpointer:
        found, by_arrays = checkpointer.restore(folder), checkpointer.restore(folder, target)
    with pytest.raises(ValueError, match="state is dict, but must be ScaleByVsgdState"):
        case.solver().update(params, found["state"], params)
    # `init` put the count on a single device.
    with pytest.raises(ValueError, match=r"Received incompatible devices for jitted computation(.|\n)*count"):
        _continued(by_arrays, case, layout)
    typed = ScaleByVsgdState(**found["state"][0]), *state[1:]
    return _continued(problem.Trained(found["params"], typed), case, layout)
