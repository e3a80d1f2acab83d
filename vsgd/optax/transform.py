"""The gradient transformations of any rule: its directions, the step that follows from them, and rounded parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import islice
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vsgd import core, prior, rounding
from vsgd.backends.jax import compute_words, list_varying_axes, make_key, to_bfloat16
from vsgd.backends.jax_step import Leaf, step_leaves
from vsgd.optax.numerics import (
    cast_hyperparameters,
    check_gradient,
    check_tracking,
    choose_arithmetic_dtype,
    get_dtype,
    join_complex,
    split_complex,
)
from vsgd.optax.state import get_arrays
from vsgd.outliers import choose_rule
from vsgd.validation import validate_numbers, validate_state_dtype

Mask = Any | Callable[[optax.Params], Any] | None


def scale_by_rule(
    plain_rule: core.Rule, make_state: type[Any], state_dtype: str, seed: Any, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that replaces gradients by the directions of a rule.

    Args:
        plain_rule: the variant without outlier threshold.
        make_state: the type of its state.
        state_dtype: "float32" or "bfloat16".
        seed: the seed of stochastic rounding.
        **options: the rule's hyperparameters and `outlier_threshold`.
    """
    rule = choose_rule(plain_rule, options["outlier_threshold"])
    validate_numbers(jax.Array, **{name: options[name] for name in rule.hyperparameters._fields}, seed=seed)
    hyper = rule.select_hyperparameters(options)
    calibrates = prior.is_auto(options["prior_strength"])
    validate_state_dtype(state_dtype)
    compute_key = make_key(seed)

    def compute_variance_scales(dtype: Any) -> tuple[jax.Array, jax.Array]:
        first, last = rule.variance_scales(cast_hyperparameters(hyper, dtype))
        return jnp.asarray(first, dtype), jnp.asarray(last, dtype)

    def init(params: optax.Params) -> Any:
        def fill(param: Any, index: int) -> jax.Array:
            if not jnp.issubdtype(get_dtype(param), jnp.inexact):
                raise ValueError(f"params has an array of {get_dtype(param)}, but must have floating or complex numbers")
            dtype = choose_arithmetic_dtype(get_dtype(param))
            real = jnp.finfo(dtype).dtype
            value = jnp.asarray(rule.initial_state(cast_hyperparameters(hyper, real))[index], real)
            stored = state_dtype if dtype == jnp.float32 else dtype
            return jnp.full_like(param, join_complex(value, value) if dtype != real else value, dtype=stored)

        trees = (jax.tree.map(functools.partial(fill, index=i), params) for i in range(len(rule.state_names)))
        # By the parameters, so that it does not depend on whether 64 bits are enabled.
        real_dtypes = (jnp.finfo(choose_arithmetic_dtype(get_dtype(param))).dtype for param in jax.tree.leaves(params))
        widest = max(real_dtypes, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))
        unit = jnp.zeros([], widest) if calibrates else None
        return make_state(jnp.zeros([], jnp.int32), *trees, *compute_variance_scales(widest), unit)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any) -> tuple[optax.Updates, Any]:
        del params, extra_args
        if getattr(state, "_fields", None) != make_state._fields:
            raise ValueError(f"state is {type(state).__name__}, but must be {make_state.__name__}")
        if (state.gradient_unit is not None) != calibrates:
            found = "a gradient_unit" if state.gradient_unit is not None else "no gradient_unit"
            raise ValueError(
                f"state has {found}, but prior_strength is {options['prior_strength']!r}: only a state that was made with "
                "prior_strength='auto' has one, and needs it"
            )
        count = optax.safe_increment(state.count)
        unit = grad_scale = None
        if calibrates:
            measured = functools.partial(_measure_unit, updates, state.gradient_unit.dtype)
            unit = jax.lax.cond(state.gradient_unit > 0, lambda: state.gradient_unit, measured)
            grad_scale = jnp.where(unit > 0, 1 / unit, 0)

        @functools.cache
        def compute_coefficients(dtype: Any) -> Any:
            # In the arithmetic's dtype: a power of a float32 count would cost a float64 run its accuracy.
            return rule.coefficients(count.astype(dtype), cast_hyperparameters(hyper, dtype))

        def split_leaf(path: Any, grad: Any, number: int, *arrays: jax.Array) -> list[Leaf]:
            if grad is None:
                return []
            check_gradient("updates", path, grad, arrays)
            stored = arrays[0].dtype
            dtype = choose_arithmetic_dtype(stored)
            key = compute_key(number, count) if stored == jnp.bfloat16 else None
            halves = get_dtype(grad) == jnp.bfloat16 and dtype == jnp.float32
            grad_parts = split_complex(jnp.asarray(grad, jnp.bfloat16 if halves else dtype))
            pairs = zip(grad_parts, zip(*map(split_complex, arrays), strict=True), strict=True)
            return [Leaf(part, old, key) for part, old in pairs]

        treedef: Any
        grads, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda leaf: leaf is None)
        state_trees = get_arrays(state)
        trees = [treedef.flatten_up_to(tree) for tree in (_number_leaves(state_trees[0]), *state_trees)]
        split = [split_leaf(path, grad, *of_leaf) for (path, grad), *of_leaf in zip(grads, *trees, strict=True)]
        stepped = iter(step_leaves(rule, [part for parts in split for part in parts], compute_coefficients, grad_scale))
        leaves: list[tuple[Any, ...]] = []
        for (_, grad), parts, *old in zip(grads, split, *trees[1:], strict=True):
            if grad is None:
                leaves.append((None, *old))
            else:
                direction, new = jax.tree.map(join_complex, *islice(stepped, len(parts)))
                leaves.append((direction.astype(get_dtype(grad)), *new))
        directions, *new_trees = (treedef.unflatten([leaf[i] for leaf in leaves]) for i in range(1 + len(state_trees)))
        count = count if unit is None else jnp.where(unit > 0, count, state.count)
        return directions, make_state(count, *new_trees, *compute_variance_scales(state.drift_scale.dtype), unit)

    return optax.GradientTransformationExtraArgs(init, update)


def _measure_unit(grads: optax.Updates, dtype: Any) -> jax.Array:
    """Return the root mean square of all elements, over all devices; 0 if they are all zero or not finite."""
    check_tracking()
    by_axes: dict[tuple[str, ...], list[jax.Array]] = {}
    for grad in map(jnp.asarray, jax.tree.leaves(grads)):
        by_axes.setdefault(tuple(sorted(list_varying_axes(jax.typeof(grad)))), []).extend(split_complex(grad))
    shards, numbers = [], 0
    for axes, arrays in by_axes.items():
        combine = [functools.partial(reduce, axis_name=axes) for reduce in (jax.lax.pmax, jax.lax.psum)] if axes else []
        shards.append(prior.Shards(arrays, lambda array: array.astype(choose_arithmetic_dtype(array.dtype)), *combine))
        numbers += sum(array.size for array in arrays) * (jax.lax.psum(1, axes) if axes else 1)
    return jnp.asarray(prior.measure_unit(jnp, shards, numbers), dtype)


def _hold_until_calibrated(solver: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    def update(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any) -> tuple[optax.Updates, Any]:
        steps, new_state = solver.update(updates, state, params, **extra_args)
        calibrated = new_state[0].gradient_unit > 0
        return jax.tree.map(lambda step: jnp.where(calibrated, step, jnp.zeros_like(step)), steps), new_state

    return optax.GradientTransformationExtraArgs(solver.init, update)


def descend(
    scaling: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
    calibrates: bool,
) -> optax.GradientTransformationExtraArgs:
    """Return a chain of a scaling, decoupled weight decay and the step size.

    Args:
        scaling: the scaling by a rule.
        learning_rate: the step size.
        weight_decay: decoupled weight decay.
        mask: which parameters decay.
        calibrates: whether to hold all parameters, decay included, until a gradient has calibrated the scaling.
    """
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    validate_numbers(jax.Array, **{name: rate for name, rate in rates.items() if not callable(rate)})
    # As Python floats, which take on an array's dtype; NumPy's would widen it.
    learning_rate, weight_decay = (float(rate) if isinstance(rate, Real) else rate for rate in rates.values())
    chain = optax.chain(
        scaling,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _hold_until_calibrated(chain) if calibrates else chain


def round_steps(
    solver: optax.GradientTransformationExtraArgs, rule: core.Rule, seed: Any
) -> optax.GradientTransformationExtraArgs:
    """Return a solver that steps to stochastically rounded bfloat16 parameters.

    Args:
        solver: a chain that begins with the rule's scaling.
        rule: the rule.
        seed: the seed of the rounding.
    """
    compute_key = make_key(seed)
    multiplier = rounding.MULTIPLIERS[len(rule.state_names)]

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32) if get_dtype(leaf) == jnp.bfloat16 else leaf, tree)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any) -> tuple[optax.Updates, Any]:
        # In float32 from the gradient on: a decay or direction in bfloat16 would be rounded twice.
        steps, new_state = solver.update(widen(updates), state, widen(params), **extra_args)

        def round_leaf(step: Any, number: Any, param: Any) -> Any:
            if step is None or get_dtype(param) != jnp.bfloat16:
                return step
            old = jnp.asarray(param, jnp.float32)
            new = old + jnp.asarray(step, jnp.float32)
            # `old + (rounded - old)` is exact: both are numbers of 8 digits, and float32 has 24.
            words = compute_words(compute_key(number, new_state[0].count), old.shape)
            return to_bfloat16(new, words, multiplier) - old

        numbers = _number_leaves(state[0].mu_g)
        return jax.tree.map(round_leaf, steps, numbers, params, is_leaf=lambda leaf: leaf is None), new_state

    return optax.GradientTransformationExtraArgs(solver.init, update)


def _number_leaves(tree: Any) -> Any:
    """Return the tree with each leaf replaced by its index."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, range(len(leaves)))
