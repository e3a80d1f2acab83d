"""Watch the gradients of any Keras optimizer: see `vsgd.observer`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from vsgd import observer
from vsgd.backends import keras as backend
from vsgd.keras.checkpoints import check_dtype, check_shapes, get_name
from vsgd.observer import Hyperparameters, State
from vsgd.posterior import Posterior

_update = observer.make_update(ops)


@keras.saving.register_keras_serializable(package="vsgd")
class GradientObserver(keras.optimizers.Optimizer):
    """Estimate each gradient element's mean, noise and drift while any optimizer trains.

    The observer wraps an optimizer, as `keras.optimizers.LossScaleOptimizer` does, because Keras passes gradients only to
    optimizers. It filters the gradients that `apply` receives, before clipping and accumulation, and changes no step. It
    learns its gain from the gradients, so that noise and intervals are right where gradients change slowly; read them after
    a few hundred steps. `docs/uncertainty.md` measures how far to trust them. Gradients that are not finite change nothing.

    To scale the loss dynamically, wrap the observer: `LossScaleOptimizer(GradientObserver(optimizer))`. TensorFlow's
    strategies with several replicas raise an error, because each replica sees the gradients of its own examples.

    Args:
        inner_optimizer: the optimizer that trains.
        max_elements: the largest number of watched elements of one variable, a fixed random choice; None: all. The memory is 20
            bytes for each watched element, 16 where all are watched.
        gain_rate: the learning rate of the gains, in (0, 1): see `vsgd.observer.Hyperparameters`.
        forgetting_floor: the smallest learning rate of the innovations' variance, in [0, 1).
        seed: an integer, the seed of the choice of elements.
        name: the optimizer's name.

    Raises:
        TypeError: `inner_optimizer` is no Keras optimizer.
        ValueError: an option is out of its range.

    Example:
        >>> import keras, numpy as np
        >>> from vsgd.keras import GradientObserver
        >>> weight = keras.Variable([1.0, -2.0])
        >>> optimizer = GradientObserver(keras.optimizers.AdamW(0.0))
        >>> for noise in np.random.default_rng(0).normal(size=(200, 2)):
        ...     optimizer.apply([keras.ops.convert_to_tensor([3.0, 0.0] + noise, "float32")], [weight])
        >>> print(keras.ops.convert_to_numpy(optimizer.posterior(weight).noise_variance).round())
        [1. 1.]
    """

    def __init__(
        self,
        inner_optimizer: Any,
        max_elements: int | None = 16384,
        gain_rate: float = 0.003,
        forgetting_floor: float = 0.01,
        *,
        seed: int = 0,
        name: str = "gradient_observer",
    ) -> None:
        if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
            raise TypeError(f"inner_optimizer is {type(inner_optimizer).__name__}, but must be a Keras optimizer")
        hyper = Hyperparameters(gain_rate, forgetting_floor)
        observer.validate_options(max_elements, seed, hyper)
        super().__init__(learning_rate=0.0, name=name)
        self._hyper = hyper
        self.inner_optimizer = inner_optimizer
        self.max_elements = max_elements
        self.seed = int(seed)  # the configuration cannot hold NumPy's integers

    def build(self, variables: Sequence[Any]) -> None:
        """Create the state of each variable, and build the inner optimizer.

        Args:
            variables: the variables that the inner optimizer will update.

        Raises:
            ValueError: a variable has neither floating nor complex numbers, or TensorFlow has several replicas. Nothing has
                changed.
        """
        if self.built:
            return
        replicas = getattr(getattr(self, "_distribution_strategy", None), "num_replicas_in_sync", 1)
        if replicas > 1:
            raise ValueError(f"the strategy has {replicas} replicas, but a GradientObserver must have one")
        for variable in variables:
            check_dtype(variable)
        self._elements: list[Any] = []
        self._states: list[State | None] = []
        for index, variable in enumerate(variables):
            elements, states = self._add_state(variable, index)
            self._elements.append(elements)
            self._states.append(states)
        self.inner_optimizer.build(variables)
        super().build(variables)

    def _add_state(self, variable: Any, index: int) -> tuple[Any, State | None]:
        """Return the variables of the watched indices and of the state; None and None for one that its gradient overwrites."""
        if getattr(variable, "overwrite_with_gradient", False):
            return None, None
        dtype = backend.choose_arithmetic_dtype(keras.backend.standardize_dtype(variable.dtype))
        shape = (*variable.shape, 2) if dtype.startswith("complex") else tuple(variable.shape)
        chosen = observer.choose_elements(int(np.prod(shape)), self.max_elements, self.seed, index)
        label = get_name(variable).replace("/", "_").replace(":", "_")
        elements = None
        if chosen is not None:
            shape = chosen.shape
            elements = self.add_variable(
                shape, lambda shape, dtype: ops.convert_to_tensor(chosen, dtype), chosen.dtype.name, name=f"{label}_elements"
            )

        def add(name: str, value: float) -> Any:
            # A NumPy number: Keras passes a Python float through float32 on TensorFlow.
            initializer = keras.initializers.Constant(np.float64(value))
            return self.add_variable(shape, initializer, backend.choose_real_dtype(dtype), name=f"{label}_{name}")

        return elements, State(*itertools.starmap(add, observer.INITIAL_STATE._asdict().items()))

    @property
    def variables(self) -> list[Any]:
        """The variables of the observer, then those of the inner optimizer."""
        return [*self._variables, *self.inner_optimizer.variables]

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Observe gradients, and take a step by the inner optimizer.

        Args:
            grads: for each variable a gradient of its shape, or None.
            trainable_variables: the variables; None: those that the optimizer was built with.

        Raises:
            ValueError: the optimizer was not built with a variable, or the gradients do not fit the variables. Nothing has
                changed.
        """
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                with keras.name_scope(self.name, caller=self):
                    self.build(trainable_variables)
        grads = [backend.convert_gradient(grad) for grad in grads]
        count = self._iterations + 1
        for grad, elements, state in self._pair(grads, trainable_variables):
            old = _read(state)
            dtype = keras.backend.standardize_dtype(old.mean.dtype)
            scale = self.inner_optimizer.loss_scale_factor
            watched = _select_watched(grad, elements, dtype)
            coefficients = observer.compute_coefficients(ops.cast(count, dtype), self._hyper)
            new = _update(watched if scale is None else watched / scale, old, coefficients)
            for target, value in zip(state, new, strict=True):
                target.assign(value)
        self._iterations.assign_add(1)
        self.inner_optimizer.apply(grads, trainable_variables)

    def posterior(self, variable: Any) -> Posterior:
        """Return the posterior of a variable's gradient: the uncertainty of the gradient, not of the weights.

        Args:
            variable: a variable that the optimizer was built with.

        Returns:
            Copies, tensors of the backend, float64 for float64 variables, else float32. They have the variable's shape if all
            its elements are watched, with a last axis of 2 for complex numbers; else they are 1-D, in the order of
            `elements(variable)`.

        Raises:
            ValueError: the optimizer was not built with the variable, or the variable's gradient is its new value.
        """
        _, state = self._get_state(variable)
        return Posterior(*map(ops.copy, observer.compute_posterior(_read(state))))

    def elements(self, variable: Any) -> Any:
        """Return the indices of a variable's watched elements.

        Args:
            variable: a variable that the optimizer was built with.

        Returns:
            Ascending indices into the flattened variable (real and imaginary parts alternate), or None if all are watched.

        Raises:
            ValueError: as for `posterior`.
        """
        elements, _ = self._get_state(variable)
        return None if elements is None else ops.copy(ops.convert_to_tensor(elements))

    def surprise(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> list[Any]:
        """Return how unexpected gradients are before a step takes them, after at least one other step.

        Args:
            grads: gradients as for `apply`, without loss scale; a gradient may be None.
            trainable_variables: their variables; None: those that the optimizer was built with.

        Returns:
            For each gradient that is not None its squared innovations over their expected variances, both summed over the
            watched elements; near 1 where the model fits and large at a spike.

        Raises:
            ValueError: the optimizer was not built with a variable, or the gradients do not fit the variables.
        """
        grads = [backend.convert_gradient(grad) for grad in grads]

        def compute_surprise(grad: Any, elements: Any, state: State) -> Any:
            dtype = keras.backend.standardize_dtype(state.mean.dtype)
            return observer.sum_innovations(_select_watched(grad, elements, dtype), _read(state), ops.sum).surprise

        return [compute_surprise(*each) for each in self._pair(grads, trainable_variables)]

    def _pair(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None) -> list[tuple[Any, Any, State]]:
        """Return the gradients that are not None with the watched indices and the state of their variables."""
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(f"grads has {len(grads)} items, but there are {len(variables)} variables")
        check_shapes(grads, variables)
        pairs = [(grad, variable) for grad, variable in zip(grads, variables, strict=True) if grad is not None]
        is_watched = [not getattr(variable, "overwrite_with_gradient", False) for _, variable in pairs]
        return [(grad, *self._get_state(each)) for (grad, each), yes in zip(pairs, is_watched, strict=True) if yes]

    def _get_state(self, variable: Any) -> tuple[Any, State]:
        if not self.built or self._var_key(variable) not in self._trainable_variables_indices:
            raise ValueError(f"variable is {get_name(variable)}, but must be one that the optimizer was built with")
        index = self._get_variable_index(variable)
        state = self._states[index]
        if state is None:
            raise ValueError(
                f"variable is {get_name(variable)}, which its gradient overwrites, but must be one that is stepped"
            )
        return self._elements[index], state

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The inner optimizer's count of steps."""
        return self.inner_optimizer.iterations

    def scale_loss(self, loss: Any) -> Any:
        """Scale a loss as the inner optimizer does.

        Args:
            loss: the loss.
        """
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Set the final values of the model's variables, as the inner optimizer does.

        Args:
            var_list: the model's variables.
        """
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, from which `from_config` makes an equal optimizer."""
        return {
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "max_elements": self.max_elements,
            **self._hyper._asdict(),
            "seed": self.seed,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> GradientObserver:
        """Return an observer with the arguments of `get_config`.

        Args:
            config: the arguments.
            custom_objects: classes that are not registered with Keras, by name.
        """
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects=custom_objects)
        return cls(**{**config, "inner_optimizer": inner})


def _read(state: State) -> State:
    """Return a state as tensors: on TensorFlow every operation on a variable reads it again."""
    return State(*(ops.stop_gradient(ops.convert_to_tensor(variable)) for variable in state))


def _select_watched(grad: Any, elements: Any, dtype: str) -> Any:
    """Return the watched numbers of a gradient, in the shape and dtype of their state."""
    if hasattr(grad, "dense_shape"):
        grad = ops.add(ops.zeros(tuple(grad.dense_shape), grad.dtype), grad)
    parts = [ops.cast(part, dtype) for part in backend.split_complex(ops.stop_gradient(grad))]
    numbers = ops.stack(parts, axis=-1) if len(parts) == 2 else parts[0]
    return numbers if elements is None else ops.take(ops.reshape(numbers, (-1,)), ops.convert_to_tensor(elements), axis=0)
