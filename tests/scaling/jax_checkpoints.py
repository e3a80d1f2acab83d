"""What is saved by orbax and loaded in the tests of sharded training: how far it strayed from one device."""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P
from scaling import jax_problem as problem

from vsgd.optax import ScaleByVsgdState

BEFORE, AFTER = range(3), range(3, 6)  # the seeds of what a training sees before the checkpoint, and after it


def save(case: problem.Case, folder: str) -> float:
    """Save what has come so far, while the training goes on in the same memory; how far that strayed."""
    layout = problem.layout_of()
    step = problem.make_step(case.solver(), problem.gradient_of(case, layout), donate_argnums=(0, 1))
    trained = problem.advance(step, problem.fresh(case, layout), case, layout, BEFORE)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, trained)
        trained = problem.advance(step, trained, case, layout, AFTER)
    return problem.strayed(trained, problem.reference(case, AFTER.stop))


def load(case: problem.Case, folder: str, *shape: int) -> float:
    """How far what is loaded on a mesh strayed, and some steps later."""
    layout = problem.layout_of(*shape)
    with ocp.StandardCheckpointer() as checkpointer:
        trained = checkpointer.restore(folder, _target_of(case, layout))
    return _continued(trained, case, layout)


def _continued(trained: problem.Trained, case: problem.Case, layout: problem.Layout) -> float:
    loaded = problem.strayed(trained, problem.reference(case, BEFORE.stop))
    trained = problem.advance(problem.make_step(case.solver(), problem.gradient_of(case, layout)), trained, case, layout, AFTER)
    return max(loaded, problem.strayed(trained, problem.reference(case, AFTER.stop)))


def _target_of(case: problem.Case, layout: problem.Layout) -> problem.Trained:
    """Shapes, dtypes and places of what is to be loaded, and no numbers."""
    shardings, whole = layout.shardings(layout.specs), layout.shardings(P())
    params = {name: jax.ShapeDtypeStruct(problem.SHAPES[name], case.dtype, sharding=shardings[name]) for name in problem.SHAPES}
    state = jax.eval_shape(case.solver().init, params)
    return problem.Trained(
        params, jax.tree.map(_placed, state, problem.state_shardings(case.solver(), params, shardings, whole))
    )


def _placed(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def load_otherwise(case: problem.Case, folder: str) -> float:
    """How far it strayed that was loaded without a target, once it had its type again; by arrays for one it does not run."""
    layout = problem.layout_of()
    params, state = target = problem.fresh(case, layout)
    with ocp.StandardCheckpointer() as checkpointer:
        found, by_arrays = checkpointer.restore(folder), checkpointer.restore(folder, target)
    with pytest.raises(ValueError, match="state is dict, but must be ScaleByVsgdState"):
        case.solver().update(params, found["state"], params)
    # `init` had put the count on one device.
    with pytest.raises(ValueError, match=r"Received incompatible devices for jitted computation(.|\n)*count"):
        _continued(by_arrays, case, layout)
    typed = ScaleByVsgdState(**found["state"][0]), *state[1:]
    return _continued(problem.Trained(found["params"], typed), case, layout)
