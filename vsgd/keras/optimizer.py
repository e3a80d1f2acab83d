"""What VSGD and ConstantVSGD for Keras share: everything but the rule and its hyperparameters."""

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
from vsgd.backends import keras as keras_arrays
from vsgd.keras import posterior as keras_posterior
from vsgd.keras.checkpoints import assign_all
from vsgd.outliers import rule_of
from vsgd.posterior import NoiseScales, Posterior

if keras.backend.backend() == "torch":
    import torch

    from vsgd.backends.torch import dispatch as torch_engines
    from vsgd.backends.torch.leaves import leaf_of

# What Keras calls otherwise.
_KERAS_NAMES = {"eps": "epsilon"}

# What an optimizer is given besides hyperparameters and the base class's own.
_OPTIONS = ("state_dtype", "seed", "stochastic_rounding", "outlier_threshold")


class RuleOptimizer(keras.optimizers.Optimizer):
    """An optimizer by whatever rule a subclass names."""

    _kind: ClassVar[core.Rule]

    def __init__(self, **arguments: Any) -> None:
        hyper = {name: arguments.pop(name) for name in self._hyperparameter_names()}
        options = {name: arguments.pop(name) for name in _OPTIONS}
        core.validate(**hyper, seed=options["seed"])
        core.validate_state_dtype(options["state_dtype"])
        core.validate_flags(stochastic_rounding=options["stochastic_rounding"])
        if isinstance(arguments["learning_rate"], Real):
            core.validate(learning_rate=arguments["learning_rate"])
        if arguments["weight_decay"] is not None:
            core.validate(weight_decay=arguments["weight_decay"])
        if options["outlier_threshold"] is not None:
            core.validate(outlier_threshold=options["outlier_threshold"])
        super().__init__(**arguments)
        self._rule = rule_of(self._kind, options["outlier_threshold"])
        options["seed"] = int(options["seed"])  # for the configuration, where NumPy's cannot stand
        for name, value in (hyper | options).items():
            setattr(self, name, value)

    @classmethod
    def _hyperparameter_names(cls) -> list[str]:
        return [_KERAS_NAMES.get(name, name) for name in cls._kind.hyperparameters._fields]

    def _hyper(self) -> Any:
        hyper = {name: getattr(self, _KERAS_NAMES.get(name, name)) for name in self._rule.hyperparameters._fields}
        return self._rule.hyperparameters(**hyper)

    def _may_round(self) -> bool:
        """Whether anything may be rounded stochastically."""
        return self.state_dtype == "bfloat16" or self.stochastic_rounding

    def _rounds(self, variable: Any) -> bool:
        """Whether the variable itself is."""
        return self.stochastic_rounding and keras.backend.standardize_dtype(variable.dtype) == "bfloat16"

    def build(self, variables: Sequence[Any]) -> None:
        """Create the state of each variable.

        Args:
            variables: the variables that the optimizer will update.
        """
        if self.built:
            return
        super().build(variables)
        initial = dict(zip(self._rule.state_names, self._rule.initial_state(self._hyper()), strict=True))
        # One list for each variable; None where the gradient is the variable's new value, as float8 scales have it.
        self._states = [
            None
            if getattr(variable, "overwrite_with_gradient", False)
            else [self._add_state(variable, name, value) for name, value in initial.items()]
            for variable in variables
        ]
        self._keys = [rounding.base_key(self.seed, i) if self._may_round() else None for i in range(len(variables))]

    def _add_state(self, variable: Any, name: str, value: float) -> Any:
        # Not `add_variable_from_reference`, which has no other dtype than the variable's.
        label = getattr(variable, "path", variable.name).replace("/", "_").replace(":", "_")
        dtype = keras_arrays.state_dtype(variable, self.state_dtype)
        fill = complex(value, value) if dtype.startswith("complex") else value
        with self._beside(variable):
            return self.add_variable(
                shape=variable.shape,
                # Of NumPy: Keras takes a Python float through float32 on TensorFlow.
                initializer=keras.initializers.Constant(np.asarray(fill)[()]),
                dtype=dtype,
                layout=getattr(variable, "_layout", None),
                name=f"{label}_{name}",
            )

    def _beside(self, variable: Any) -> contextlib.AbstractContextManager[Any]:
        """Where TensorFlow makes state on each device that the variable is on, or refuses to."""
        if keras.backend.backend() != "tensorflow":
            return contextlib.nullcontext()
        value = variable.value if isinstance(variable, keras.Variable) else variable
        beside: contextlib.AbstractContextManager[Any] = self._distribution_strategy.extended.colocate_vars_with(value)
        return beside

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        # What is rounded stochastically decays in the update: here it would be rounded to the nearest, and the decay lost.
        others = [variable for variable in variables if not self._rounds(variable)] if self.stochastic_rounding else variables
        if others:
            super()._apply_weight_decay(others)

    def _own_decay(self, variable: Any) -> float:
        """The weight decay that is left to the update."""
        decays = self._rounds(variable) and self.weight_decay is not None and self._use_weight_decay(variable)
        return float(self.weight_decay) if decays else 0.0

    def _backend_update_step(self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any) -> None:
        """Update all variables: on PyTorch by our own engines, elsewhere, and where PyTorch compiles, one after the other."""
        if keras.backend.backend() == "torch" and not torch.compiler.is_compiling():
            self._step_by_engines(grads, trainable_variables, learning_rate)
            return
        dtypes = dict.fromkeys(keras_arrays.real_dtype(state[0].dtype) for state in self._states if state)
        scalars: dict[str, Any] = {dtype: self._scalars(learning_rate, dtype) for dtype in dtypes}
        if self._may_round():
            scalars["int32"] = ops.cast(self.iterations + 1, "int32")
        # In the place of the learning rate, for so they come to each device.
        super()._backend_update_step(grads, trainable_variables, scalars)

    def _scalars(self, learning_rate: Any, dtype: str) -> tuple[Any, Any]:
        # In the state's dtype: a power of a float32 count would cost a float64 run its accuracy.
        coefficients = self._rule.coefficients(ops.cast(self.iterations + 1, dtype), self._hyper())

        def scalar(value: Any) -> Any:
            # Not `ops.cast`: on TensorFlow a Python float would go through float32. And of a variable its value.
            return ops.stop_gradient(ops.convert_to_tensor(value, dtype))

        return scalar(learning_rate), type(coefficients)(*map(scalar, coefficients))

    def _step_by_engines(self, grads: Sequence[Any], variables: Sequence[Any], learning_rate: Any) -> None:
        with torch.no_grad():
            kinds: dict[float, list[Any]] = {}
            for variable, grad in zip(variables, grads, strict=True):
                kinds.setdefault(self._own_decay(variable), []).append(self._leaf(variable, grad))
            count, lr = _number(self.iterations) + 1, _number(learning_rate)
            for weight_decay, leaves in kinds.items():
                torch_engines.step_at(self._rule, self._hyper(), leaves, count, lr, weight_decay)

    def _leaf(self, variable: Any, grad: Any) -> Any:
        index = self._get_variable_index(variable)
        param = variable.value
        state = tuple(each.value for each in self._states[index])
        if grad.dtype is not param.dtype:
            # An odd gradient would keep the fused engine away, and so round otherwise.
            grad = grad.to(torch.promote_types(state[0].dtype, torch.float32))
        return leaf_of(param, grad, state, self._keys[index], self.stochastic_rounding)

    def posterior(self, variable: Any) -> Posterior:
        """What is known of a variable's gradient: the uncertainty of the gradient, not of the weights.

        Args:
            variable: one that the optimizer was built with.

        Returns:
            The backend's tensors, of the variable's shape, float64 for float64 variables, else float32; copies.

        Raises:
            ValueError: the optimizer was not built with the variable, or its gradient is its new value.
        """
        state = self._state_of(variable)
        if state is None:
            raise ValueError(f"variable is {_name(variable)}, which its gradient overwrites, but must be one that is stepped")
        return keras_posterior.posterior_of(state, self._scales())

    def noise_scale(self, *, batch_size: float) -> NoiseScales:
        """The gradient noise scale (arXiv 1812.06162) of all variables; see `vsgd.posterior.noise_scale` for how.

        Args:
            batch_size: how many examples a gradient is the mean of, on all devices and in accumulated steps together.

        Returns:
            The estimates overall and, in `tensors`, a list in the order of the variables that the optimizer was built with;
            None for those that have no gradient but a new value.

        Raises:
            ValueError: `batch_size` is out of its range, or the optimizer is not built, or has no variable with a gradient.
        """
        core.validate(batch_size=batch_size)
        if not self.built:
            raise ValueError("the optimizer has no variables yet, but must be built: call `build` or train")
        if not any(self._states):
            raise ValueError("the optimizer has no variable that is stepped, but must have one")
        return keras_posterior.noise_scales(self._states, self._scales(), batch_size)

    def surprise(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> list[Any]:
        """How unexpected gradients are before a step takes them, averaged over each variable: see `vsgd.posterior`.

        Args:
            grads: as for `apply`; a gradient may be None.
            trainable_variables: the variables that they are of; None: those that the optimizer was built with.

        Returns:
            For each gradient the mean of its squared standardized innovations, near 1 where the model fits; None where there
            is no gradient, or it is the variable's new value.

        Raises:
            ValueError: the optimizer was not built with a variable, or the gradients do not fit the variables.
        """
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        if len(grads) != len(variables):
            raise ValueError(f"grads has {len(grads)} items, but there are {len(variables)} variables")
        _check_shapes(grads, variables)
        pairs = zip(grads, variables, strict=True)
        states = [(grad, None if grad is None else self._state_of(variable)) for grad, variable in pairs]
        scales = self._scales()
        return [None if state is None else keras_posterior.mean_surprise(grad, state, scales) for grad, state in states]

    def _state_of(self, variable: Any) -> list[Any] | None:
        if not self.built or self._var_key(variable) not in self._trainable_variables_indices:
            raise ValueError(f"variable is {_name(variable)}, but must be one that the optimizer was built with")
        state: list[Any] | None = self._states[self._get_variable_index(variable)]
        return state

    def _scales(self) -> tuple[Any, Any]:
        return self._rule.variance_scales(self._hyper())

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Take one step, as the base class does, but refuse gradients of other shapes, which would broadcast.

        Args:
            grads: a gradient of its variable's shape for each variable; a variable with None is left alone.
            trainable_variables: the variables that they are of; None: those that the optimizer was built with.

        Raises:
            ValueError: the optimizer was not built with a variable, or the gradients do not fit the variables. Nothing was
                changed.
        """
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        _check_shapes(grads, variables)
        super().apply(grads, trainable_variables if trainable_variables is None else variables)

    def stateless_apply(
        self, optimizer_variables: Sequence[Any], grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """`apply` that returns the new values and assigns nothing; as in Keras, not on TensorFlow.

        Args:
            optimizer_variables: values of the optimizer's variables.
            grads: a gradient for each of the variables that the optimizer was built with.
            trainable_variables: values of those variables.

        Returns:
            The new values of the variables, and of the optimizer's.

        Raises:
            ValueError: the optimizer is not built, or a list is of another length.
        """
        if keras.backend.backend() == "torch":  # the engines write in place
            optimizer_variables = [value.clone() for value in optimizer_variables]
            trainable_variables = [value.clone() for value in trainable_variables]
        new: tuple[list[Any], list[Any]] = super().stateless_apply(optimizer_variables, grads, trainable_variables)
        return new

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update a variable and its state, given its gradient.

        Args:
            gradient: the gradient, clipped and unscaled by the base class; zero in the rows that `tf.IndexedSlices` leave out.
            variable: the variable, its weight decay done by the base class, but where it is rounded stochastically.
            learning_rate: by dtype of the arithmetic, the step size and the coefficients of this step; and the step's count as
                "int32", where anything is rounded stochastically.
        """
        index = self._get_variable_index(variable)
        states = self._states[index]
        # Read once each: on TensorFlow every operation on a variable would read it anew.
        param, *state = map(ops.stop_gradient, (variable, *states))
        stored = keras.backend.standardize_dtype(state[0].dtype)
        dtype = keras_arrays.arithmetic_dtype(stored)
        gradient = ops.cast(gradient, dtype)
        if hasattr(gradient, "dense_shape"):
            gradient = ops.add(ops.zeros_like(state[0]), gradient)
        scalars = learning_rate[keras_arrays.real_dtype(dtype)]
        if stored == "bfloat16" or self._rounds(variable):
            update: Callable[..., list[Any]] = keras_arrays.new_rounded_values
            fixed: tuple[Any, ...] = (self._rule, self._rounds(variable))
            decay = 1 - scalars[0] * self._own_decay(variable)
            scalars = (*scalars, decay, ops.convert_to_tensor(self._keys[index], "int32"), learning_rate["int32"])
        else:
            update, fixed = keras_arrays.new_values, (self._rule,)
            param = ops.cast(param, dtype)
        make = partial(keras_arrays.compiled, tuple(variable.shape)) if keras_arrays.is_better_compiled(variable) else partial
        values = make(update, *fixed)([param, gradient, *state], *scalars)
        for each, value in zip((variable, *states), values, strict=True):
            self.assign(each, value)

    def load_own_variables(self, store: Any) -> None:
        """Load what `save_own_variables` saved: all of it or nothing.

        As in Keras, another number of variables is not loaded, with a warning. Values are not looked at.

        Args:
            store: arrays by "0", "1", ... in the order of `variables`.

        Raises:
            ValueError: the store does not fit the optimizer's variables. Nothing was changed.
        """
        names = [str(i) for i in range(len(self.variables))]
        if len(store.keys()) != len(names):
            super().load_own_variables(store)
            return
        missing = [name for name in names if name not in store.keys()]  # noqa: SIM118  # a store of HDF5 is no mapping
        if missing:
            raise ValueError(f"store lacks {', '.join(missing)}, but must have arrays for all variables, named by number")
        # Read whole first, for a damaged file may fail at any array.
        assign_all(self.variables, "store", [store[name] for name in names])

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the values of all variables, or of none.

        Args:
            weights: arrays in the order of `variables`.

        Raises:
            ValueError: the optimizer is not built, or the arrays do not fit its variables. Nothing was changed.
        """
        if not self.built:
            super().set_weights(weights)  # which says so
        if len(weights) != len(self.variables):
            raise ValueError(f"weights has {len(weights)} arrays, but the optimizer has {len(self.variables)} variables")
        assign_all(self.variables, "weights", weights)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, from which `from_config` makes an equal optimizer.

        Returns:
            The arguments by name, serializable.
        """
        return {**super().get_config(), **{name: getattr(self, name) for name in (*self._hyperparameter_names(), *_OPTIONS)}}


def _number(value: Any) -> float:
    return float(value if isinstance(value, Real) else ops.convert_to_tensor(value).item())


def _check_shapes(grads: Sequence[Any], variables: Sequence[Any]) -> None:
    for grad, variable in zip(grads, variables, strict=False):  # the base class counts them
        if grad is not None and not _fits(grad.shape, variable.shape):
            shapes = f"has shape {tuple(grad.shape)}, but must have {tuple(variable.shape)}"
            raise ValueError(f"the gradient of {_name(variable)} {shapes}")


def _fits(shape: Any, expected: Any) -> bool:
    # TensorFlow knows some shapes only in part.
    return shape.is_compatible_with(expected) if hasattr(shape, "is_compatible_with") else tuple(shape) == tuple(expected)


def _name(variable: Any) -> str:
    return getattr(variable, "path", getattr(variable, "name", type(variable).__name__))
