"""The Keras optimizer of any rule: configuration, state, steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from vsgd import core, rounding
from vsgd.backends import keras as backend
from vsgd.backends.keras import Scalars
from vsgd.keras.checkpoints import assign_all, check_dtype, check_shapes
from vsgd.keras.posterior import PosteriorMixin
from vsgd.outliers import choose_rule
from vsgd.prior import is_auto
from vsgd.validation import validate_flags, validate_numbers, validate_state_dtype

# Hyperparameters that Keras names differently.
_KERAS_NAMES = {"eps": "epsilon"}

# The arguments that are neither hyperparameters nor the base class's.
_OPTIONS = ("state_dtype", "seed", "stochastic_rounding", "outlier_threshold")


class RuleOptimizer(PosteriorMixin, keras.optimizers.Optimizer):
    """The code that VSGD and ConstantVSGD share: everything but the rule and its hyperparameters."""

    _plain_rule: ClassVar[core.Rule]

    def __init__(self, **arguments: Any) -> None:
        hyper = {name: arguments.pop(name) for name in self._list_hyperparameters()}
        options = {name: arguments.pop(name) for name in _OPTIONS}
        validate_numbers(**hyper, seed=options["seed"])
        validate_state_dtype(options["state_dtype"])
        validate_flags(stochastic_rounding=options["stochastic_rounding"])
        if isinstance(arguments["learning_rate"], Real):
            validate_numbers(learning_rate=arguments["learning_rate"])
        for name, value in (("weight_decay", arguments["weight_decay"]), ("outlier_threshold", options["outlier_threshold"])):
            if value is not None:
                validate_numbers(**{name: value})
        if isinstance(arguments["weight_decay"], int):
            arguments["weight_decay"] = float(arguments["weight_decay"])  # TensorFlow would make a 32-bit integer of it
        super().__init__(**arguments)
        self._rule = choose_rule(self._plain_rule, options["outlier_threshold"])
        self._gradient_unit: Any = None
        self._skipped_steps: Any = None
        options["seed"] = int(options["seed"])  # the configuration cannot hold NumPy's integers
        for name, value in (hyper | options).items():
            setattr(self, name, value)

    @classmethod
    def _list_hyperparameters(cls) -> list[str]:
        return [_KERAS_NAMES.get(name, name) for name in cls._plain_rule.hyperparameters._fields]

    def _select_hyperparameters(self) -> Any:
        names = self._rule.hyperparameters._fields
        return self._rule.select_hyperparameters({name: getattr(self, _KERAS_NAMES.get(name, name)) for name in names})

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, from which `from_config` makes an equal optimizer."""
        names = (*self._list_hyperparameters(), *_OPTIONS)
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}

    def build(self, variables: Sequence[Any]) -> None:
        """Create the state of each variable.

        Args:
            variables: the variables that the optimizer will update.

        Raises:
            ValueError: a variable has neither floating nor complex numbers. Nothing has changed.
        """
        if self.built:
            return
        for variable in variables:
            check_dtype(variable)
        super().build(variables)
        values = self._rule.initial_state(self._select_hyperparameters())
        initial = dict(zip(self._rule.state_names, values, strict=True))
        # One list per variable; None for a variable whose gradient is its new value, such as a float8 scale.
        self._states = [
            None
            if getattr(variable, "overwrite_with_gradient", False)
            else [self._add_state(variable, name, value) for name, value in initial.items()]
            for variable in variables
        ]
        if is_auto(self.prior_strength):
            shared: dict[str, Any] = {"shape": (), "aggregation": "only_first_replica"}
            widest = "float64" if "float64" in self._list_real_dtypes() else "float32"
            self._gradient_unit = self.add_variable(dtype=widest, name="gradient_unit", **shared)
            self._skipped_steps = self.add_variable(dtype="int32", name="skipped_steps", **shared)
        rounds = self._rounds_anything()
        self._keys = [rounding.base_key(self.seed, i) if rounds else None for i in range(len(variables))]

    def _add_state(self, variable: Any, name: str, value: float) -> Any:
        # Not `add_variable_from_reference`, which has the variable's dtype only.
        label = getattr(variable, "path", variable.name).replace("/", "_").replace(":", "_")
        dtype = backend.choose_state_dtype(variable, self.state_dtype)
        fill = complex(value, value) if dtype.startswith("complex") else value
        with self._colocate(variable):
            return self.add_variable(
                shape=variable.shape,
                # A NumPy number: Keras passes a Python float through float32 on TensorFlow.
                initializer=keras.initializers.Constant(np.asarray(fill)[()]),
                dtype=dtype,
                layout=getattr(variable, "_layout", None),
                name=f"{label}_{name}",
            )

    def _list_real_dtypes(self) -> list[str]:
        return [*dict.fromkeys(backend.choose_real_dtype(states[0].dtype) for states in self._states if states)]

    def _colocate(self, variable: Any) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which TensorFlow creates state on each device of the variable, or raises an error."""
        if keras.backend.backend() != "tensorflow":
            return contextlib.nullcontext()
        value = variable.value if isinstance(variable, keras.Variable) else variable
        context: contextlib.AbstractContextManager[Any] = self._distribution_strategy.extended.colocate_vars_with(value)
        return context

    def _rounds_anything(self) -> bool:
        return self.state_dtype == "bfloat16" or self.stochastic_rounding

    def _rounds(self, variable: Any) -> bool:
        """Return whether the variable itself is rounded stochastically."""
        return self.stochastic_rounding and keras.backend.standardize_dtype(variable.dtype) == "bfloat16"

    def _decays_in_update(self, variable: Any) -> bool:
        """Return whether the update decays a variable, and not the base class.

        The base class rounds the decay to the nearest, which may lose it, and decays before a gradient has calibrated the run.
        """
        return self._gradient_unit is not None or self._rounds(variable)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        others = [variable for variable in variables if not self._decays_in_update(variable)]
        if others:
            super()._apply_weight_decay(others)

    def _get_update_decay(self, variable: Any) -> float:
        """Return the weight decay that the update applies."""
        decays = self._decays_in_update(variable) and self.weight_decay is not None and self._use_weight_decay(variable)
        return float(self.weight_decay) if decays else 0.0

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Take one step as the base class does; gradients of other shapes, which would broadcast, raise an error.

        Args:
            grads: for each variable a gradient of its shape, or None to leave the variable as it is. Nested lists,
                `tf.IndexedSlices` and JAX's sparse arrays are gradients, too.
            trainable_variables: the variables; None: those that the optimizer was built with.

        Raises:
            ValueError: the optimizer was not built with a variable, or the gradients do not fit the variables. Nothing has
                changed.
        """
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        grads = [backend.convert_gradient(grad) for grad in grads]
        check_shapes(grads, variables)
        super().apply(grads, trainable_variables if trainable_variables is None else variables)

    def _backend_update_step(self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any) -> None:
        """Update one variable after the other, with scalars that are computed once."""
        count, unit = self.iterations + 1, None
        if self._gradient_unit is not None:
            if keras.backend.backend() == "tensorflow":
                grads = [grad for grad, _ in super()._all_reduce_sum_gradients(zip(grads, trainable_variables, strict=True))]
            count = count - ops.cast(self._skipped_steps, count.dtype)
            unit = self._calibrate(grads, trainable_variables)
        step = ops.cast(count, "int32") if self._rounds_anything() else None
        by_dtype = {dtype: self._compute_scalars(learning_rate, count, unit, dtype) for dtype in self._list_real_dtypes()}
        super()._backend_update_step(grads, trainable_variables, Scalars(by_dtype, step))

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        # On TensorFlow; gradients that have been measured are sums already.
        return grads_and_vars if self._gradient_unit is not None else super()._all_reduce_sum_gradients(grads_and_vars)

    def _calibrate(self, grads: Sequence[Any], variables: Sequence[Any]) -> Any:
        """Return the unit of gradients, measured if it is missing; 0 if it cannot be measured."""
        old = ops.convert_to_tensor(self._gradient_unit)
        unit = ops.cond(old > 0, lambda: old, lambda: ops.cast(backend.measure_unit(grads, variables), old.dtype))
        self._gradient_unit.assign(unit)
        self._skipped_steps.assign(self._skipped_steps + ops.cast(unit == 0, "int32"))
        return unit

    def _compute_scalars(self, learning_rate: Any, count: Any, unit: Any, dtype: str) -> tuple[Any, Any, Any]:
        # In the state's dtype: a power of a float32 count would cost a float64 run its accuracy.
        coefficients = self._rule.coefficients(ops.cast(count, dtype), self._select_hyperparameters())

        def convert(value: Any) -> Any:
            # Not `ops.cast`: on TensorFlow it passes a Python float through float32. `stop_gradient` reads a variable.
            return ops.stop_gradient(ops.convert_to_tensor(value, dtype))

        grad_scale = None if unit is None else ops.where(unit > 0, 1 / ops.cast(unit, dtype), ops.cast(0, dtype))
        return convert(learning_rate), type(coefficients)(*map(convert, coefficients)), grad_scale

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update a variable and its state.

        Args:
            gradient: the gradient, clipped and unscaled by the base class; zero in rows that `tf.IndexedSlices` leave out.
            variable: the variable, decayed by the base class unless it is rounded stochastically.
            learning_rate: the `Scalars` of this step.
        """
        index = self._get_variable_index(variable)
        states = self._states[index]
        # Read each once: on TensorFlow every operation on a variable reads it again.
        param, *state = map(ops.stop_gradient, (variable, *states))
        stored = keras.backend.standardize_dtype(state[0].dtype)
        dtype = backend.choose_arithmetic_dtype(stored)
        gradient = ops.cast(gradient, dtype)
        if hasattr(gradient, "dense_shape"):
            gradient = ops.add(ops.zeros_like(state[0]), gradient)
        arguments: tuple[Any, ...] = learning_rate.by_dtype[backend.choose_real_dtype(dtype)]
        decay = 1.0
        if self._decays_in_update(variable):
            decay = 1 - arguments[0] * self._get_update_decay(variable)
        if stored == "bfloat16" or self._rounds(variable):
            compute: Callable[..., list[Any]] = backend.compute_rounded_step
            fixed: tuple[Any, ...] = (self._rule, self._rounds(variable))
            arguments = (*arguments, decay, ops.convert_to_tensor(self._keys[index], "int32"), learning_rate.step)
        else:
            compute, fixed, arguments = backend.compute_step, (self._rule,), (*arguments, decay)
            param = ops.cast(param, dtype)
        # On a CPU, Keras does not compile for TensorFlow, which would make an array for each operation.
        compiles = keras.backend.backend() == "tensorflow" and "CPU" in variable.device
        step = backend.compile_step(tuple(variable.shape), compute, *fixed) if compiles else partial(compute, *fixed)
        values = step([param, gradient, *state], *arguments)
        for target, value in zip((variable, *states), values, strict=True):
            self.assign(target, value)

    def load_own_variables(self, store: Any) -> None:
        """Load arrays that `save_own_variables` saved: all of them or none.

        As in Keras, a store with another number of arrays is not loaded, with a warning. Adam's state has as many arrays as
        Constant VSGD's: it is rejected if a second moment is zero, and loaded otherwise.

        Args:
            store: arrays by "0", "1", ... in the order of `variables`.

        Raises:
            ValueError: the store does not fit the optimizer's variables. Nothing has changed.
        """
        names = [str(i) for i in range(len(self.variables))]
        if len(store.keys()) != len(names):
            super().load_own_variables(store)
            return
        missing = [name for name in names if name not in store.keys()]  # noqa: SIM118  # an HDF5 store is no mapping
        if missing:
            raise ValueError(f"store lacks {', '.join(missing)}, but must have arrays for all variables, named by number")
        # All are read before one is assigned, because a damaged file may fail at any array.
        assign_all(self.variables, self._list_rates(), "store", [store[name] for name in names])

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the values of all variables, or of none.

        Args:
            weights: arrays in the order of `variables`.

        Raises:
            ValueError: the optimizer is not built, or the arrays do not fit its variables. Nothing has changed.
        """
        if not self.built:
            super().set_weights(weights)  # raises the base class's error
        if len(weights) != len(self.variables):
            raise ValueError(f"weights has {len(weights)} arrays, but the optimizer has {len(self.variables)} variables")
        assign_all(self.variables, self._list_rates(), "weights", weights)

    def _list_rates(self) -> list[Any]:
        """Return the state arrays after `mu_g`: the prior keeps them above zero."""
        return [array for states in self._states if states for array in states[1:]] if self.built else []
