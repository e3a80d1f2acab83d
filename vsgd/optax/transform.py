"""What VSGD and Constant VSGD for optax share: everything but the rule and its hyperparameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vsgd import core, rounding
from vsgd.backends import jax as jax_rounding
from vsgd.optax.numerics import arithmetic_dtype, check_gradient, dtype_of, in_dtype, join, parts, weakly_typed
from vsgd.outliers import guarded

Mask = Any | Callable[[optax.Params], Any] | None


def scale_by_rule(
    rule: core.Rule, hyper: Any, make_state: Callable[..., Any], state_dtype: str, seed: Any, outlier_threshold: Any
) -> optax.GradientTransformationExtraArgs:
    """What VSGD and Constant VSGD share: everything but the rule, its hyperparameters and its state's type."""
    rule, hyper = guarded(rule, hyper, *weakly_typed(outlier_threshold))
    core.validate(**hyper._asdict(), seed=seed)
    core.validate_state_dtype(state_dtype)
    update_real = rule.make_update(jnp)
    make_words = jax_rounding.make_words(seed)

    def init(params: optax.Params) -> Any:
        def full(param: Any, index: int) -> jax.Array:
            dtype = arithmetic_dtype(dtype_of(param))
            real = jnp.finfo(dtype).dtype
            value = jnp.asarray(rule.initial_state(in_dtype(hyper, real))[index], real)
            stored = state_dtype if dtype == jnp.float32 else dtype
            return jnp.full_like(param, join(value, value) if dtype != real else value, dtype=stored)

        trees = (jax.tree.map(functools.partial(full, index=i), params) for i in range(len(rule.state_names)))
        return make_state(jnp.zeros([], jnp.int32), *trees)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any) -> tuple[optax.Updates, Any]:
        del params, extra_args
        count = optax.safe_increment(state.count)

        @functools.cache
        def coefficients(dtype: Any) -> Any:
            # In the arithmetic's dtype: a power of a float32 count would cost a float64 run its accuracy.
            return rule.coefficients(count.astype(dtype), in_dtype(hyper, dtype))

        def update_leaf(path: Any, grad: Any, number: int, *arrays: jax.Array) -> tuple[Any, ...]:
            if grad is None:
                return None, *arrays
            check_gradient("updates", path, grad, arrays)
            stored = arrays[0].dtype
            dtype = arithmetic_dtype(stored)
            c = coefficients(jnp.finfo(dtype).dtype)
            wide = (parts(array.astype(dtype)) for array in arrays)
            pairs = zip(parts(jnp.asarray(grad, dtype)), zip(*wide, strict=True), strict=True)
            direction, new_arrays = jax.tree.map(join, *(update_real(part, of_state, c) for part, of_state in pairs))
            if stored == jnp.bfloat16:
                words = make_words(number, count, arrays[0].shape)
                factors = zip(new_arrays, rounding.MULTIPLIERS, strict=False)
                new_arrays = [
                    jax_rounding.to_bfloat16(array, words, multiplier).astype(stored) for array, multiplier in factors
                ]
            return direction.astype(dtype_of(grad)), *new_arrays

        treedef: Any
        grads, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda leaf: leaf is None)
        trees = [treedef.flatten_up_to(tree) for tree in (_numbers(state[1]), *state[1:])]
        leaves = [update_leaf(path, grad, *of_leaf) for (path, grad), *of_leaf in zip(grads, *trees, strict=True)]
        directions, *new_trees = (treedef.unflatten([leaf[i] for leaf in leaves]) for i in range(len(state)))
        return directions, make_state(count, *new_trees)

    return optax.GradientTransformationExtraArgs(init, update)


def descend(
    scaling: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    """The step from a direction: decoupled weight decay and the step size."""
    core.validate(
        **{
            name: value
            for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay))
            if not callable(value)
        }
    )
    return optax.chain(
        scaling,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def round_steps(
    solver: optax.GradientTransformationExtraArgs, rule: core.Rule, seed: Any
) -> optax.GradientTransformationExtraArgs:
    """Let a chain that begins with the rule's scaling step to stochastically rounded bfloat16 parameters."""
    make_words = jax_rounding.make_words(seed)
    multiplier = rounding.MULTIPLIERS[len(rule.state_names)]

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32) if dtype_of(leaf) == jnp.bfloat16 else leaf, tree)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any) -> tuple[optax.Updates, Any]:
        # From the gradient on, for a decay or a direction in bfloat16 would have been rounded before.
        steps, new_state = solver.update(widen(updates), state, widen(params), **extra_args)

        def round_leaf(step: Any, number: Any, param: Any) -> Any:
            if step is None or dtype_of(param) != jnp.bfloat16:
                return step
            old = jnp.asarray(param, jnp.float32)
            new = old + jnp.asarray(step, jnp.float32)
            # Adding the difference arrives there: two numbers of 8 digits, and float32 has 24.
            return jax_rounding.to_bfloat16(new, make_words(number, new_state[0].count, old.shape), multiplier) - old

        return jax.tree.map(round_leaf, steps, _numbers(state[0][1]), params, is_leaf=lambda leaf: leaf is None), new_state

    return optax.GradientTransformationExtraArgs(solver.init, update)


def _numbers(tree: Any) -> Any:
    """The tree with each leaf's number in its place."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, range(len(leaves)))
