"""What is saved by orbax and loaded in the tests of sharded training: how far it strayed from one device."""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import PartitionSpec as P
from scaling.jax_problem import (
    SHAPES,
    Case,
    Layout,
    Trained,
    advance,
    fresh_params,
    gradient_of,
    layout_of,
    make_step,
    reference,
    state_shardings,
    strayed,
)

from vsgd.optax import ScaleByVsgdState

BEFORE, AFTER = range(3), range(3, 6)  # the seeds of what a training sees before the checkpoint, and after it


def save(case: Case, folder: str) -> float:
    """Save what has come so far, while the training goes on in the same memory; how far that strayed."""
    layout = layout_of()
    params = fresh_params(layout, case)
    step = make_step(case.solver(), gradient_of(case, layout), donate_argnums=(0, 1))
    trained = advance(step, Trained(params, case.solver().init(params)), case, layout, BEFORE)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, trained)
        trained = advance(step, trained, case, layout, AFTER)
    return strayed(trained, reference(case, AFTER.stop))


def load(case: Case, folder: str, *shape: int) -> tuple[float, float]:
    """How far what is loaded on a mesh strayed, and some steps later."""
    layout = layout_of(*shape)
    with ocp.StandardCheckpointer() as checkpointer:
        trained = checkpointer.restore(folder, target_of(case, layout))
    return _continued(trained, case, layout)


def _continued(trained: Trained, case: Case, layout: Layout) -> tuple[float, float]:
    loaded = strayed(trained, reference(case, BEFORE.stop))
    step = make_step(case.solver(), gradient_of(case, layout))
    return loaded, strayed(advance(step, trained, case, layout, AFTER), reference(case, AFTER.stop))


def target_of(case: Case, layout: Layout) -> Trained:
    """Shapes, dtypes and places of what is to be loaded, and no numbers."""
    shardings, whole = layout.shardings(layout.specs), layout.shardings(P())
    params = {name: jax.ShapeDtypeStruct(SHAPES[name], case.dtype, sharding=shardings[name]) for name in SHAPES}
    state = jax.eval_shape(case.solver().init, params)
    told = state_shardings(case.solver(), params, shardings, whole)
    return Trained(params, jax.tree.map(_placed, state, told))


def _placed(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def load_without_a_target(case: Case, folder: str) -> tuple[str, float, float]:
    """What the optimizer says of state without its type; and how far it strayed once it had it again."""
    layout = layout_of()
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(folder)
    params, (scaling, *_) = found["params"], found["state"]
    said = _says(lambda: case.solver().update(params, found["state"], params))
    _, *others = case.solver().init(params)
    return said, *_continued(Trained(params, (ScaleByVsgdState(**scaling), *others)), case, layout)


def load_by_arrays(case: Case, folder: str) -> str:
    """What JAX says of a step of what was loaded with arrays for a target, whose count `init` had put on one device."""
    layout = layout_of()
    params = fresh_params(layout, case)
    target = Trained(params, case.solver().init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        trained = checkpointer.restore(folder, target)
    step = make_step(case.solver(), gradient_of(case, layout))
    return _says(lambda: advance(step, trained, case, layout, AFTER))


def _says(call: Any) -> str:
    try:
        call()
    except (AttributeError, ValueError) as error:
        return str(error)
    return "nothing"
