"""VSGD as a `keras.optimizers.Optimizer`, on whichever backend Keras runs: TensorFlow, JAX or PyTorch."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, ClassVar, TypeAlias

import numpy as np

try:
    import keras
    from keras import ops
except ImportError as error:
    if error.name != "keras":  # Keras is there, and says which backend is missing
        raise
    raise ImportError("vsgd.keras needs Keras 3: pip install 'vsgd[keras]'") from error

from vsgd import core, rounding
from vsgd.keras_prior import prior_strength_from
from vsgd.outliers import rule_of
from vsgd.posterior import NoiseScale, NoiseScales, Posterior, noise_scale, posterior, surprise

if keras.backend.backend() == "torch":
    import torch

    from vsgd.backends import torch_engines
    from vsgd.backends.torch_blocks import leaf_of

__all__ = ["VSGD", "ConstantVSGD", "prior_strength_from"]

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule | Callable[[], Any]

# What Keras calls otherwise.
_KERAS_NAMES = {"eps": "epsilon"}

# What an optimizer is given besides hyperparameters and the base class's own.
_OPTIONS = ("state_dtype", "seed", "stochastic_rounding", "outlier_threshold")


class _RuleOptimizer(keras.optimizers.Optimizer):
    """What VSGD and ConstantVSGD share: everything but the rule and its hyperparameters."""

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
        dtype = _state_dtype(variable, self.state_dtype)
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
        dtypes = dict.fromkeys(_real(state[0].dtype) for state in self._states if state)
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
            ValueError: the optimizer was not built with the variable.
        """
        known = [posterior(part, self._scales()) for part in self._real_states(self._index(variable))]
        whole = Posterior(*map(_whole, zip(*known, strict=True)))
        # The torch engines overwrite the state.
        return whole._replace(mean=ops.copy(whole.mean))

    def noise_scale(self, *, batch_size: float) -> NoiseScales:
        """The gradient noise scale (arXiv 1812.06162) of all variables; see `vsgd.posterior.noise_scale` for how.

        Args:
            batch_size: how many examples a gradient is the mean of, on all devices and in accumulated steps together.

        Returns:
            The estimates overall and, in `tensors`, a list in the order of the variables that the optimizer was built with;
            None for those that have no gradient but a new value.

        Raises:
            ValueError: `batch_size` is out of its range, or the optimizer is not built.
        """
        core.validate(batch_size=batch_size)
        if not self.built:
            raise ValueError("the optimizer has no variables yet, but must be built: call `build` or train")
        tensors = [None if state is None else self._noise_scale(index, batch_size) for index, state in enumerate(self._states)]
        return NoiseScales(functools.reduce(operator.add, filter(None, tensors)), tensors)

    def _noise_scale(self, index: int, batch_size: float) -> NoiseScale:
        parts = (posterior(part, self._scales()) for part in self._real_states(index))
        return functools.reduce(operator.add, (noise_scale(part, batch_size, ops.sum) for part in parts))

    def surprise(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> list[Any]:
        """How unexpected gradients are before a step takes them, averaged over each variable: see `vsgd.posterior`.

        Args:
            grads: as for `apply`; a gradient may be None.
            trainable_variables: the variables that they are of; None: those that the optimizer was built with.

        Returns:
            For each gradient the mean of its squared standardized innovations, near 1 where the model fits; or None.
        """
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        return [
            None if grad is None else self._surprise(grad, variable) for grad, variable in zip(grads, variables, strict=True)
        ]

    def _surprise(self, grad: Any, variable: Any) -> Any:
        states = self._real_states(self._index(variable))
        dtype = keras.backend.standardize_dtype(states[0][0].dtype)
        grads = (ops.cast(part, dtype) for part in _parts(ops.convert_to_tensor(grad)))
        each = [ops.mean(surprise(part, state, self._scales())) for part, state in zip(grads, states, strict=True)]
        return sum(each) / len(each)

    def _index(self, variable: Any) -> int:
        if not self.built or self._var_key(variable) not in self._trainable_variables_indices:
            name = getattr(variable, "path", getattr(variable, "name", type(variable).__name__))
            raise ValueError(f"variable is {name}, but must be one that the optimizer was built with")
        index: int = self._get_variable_index(variable)
        return index

    def _scales(self) -> tuple[Any, Any]:
        return self._rule.variance_scales(self._hyper())

    def _real_states(self, index: int) -> list[tuple[Any, ...]]:
        """The state of a variable, in its arithmetic's dtype, for each of its real parts."""
        state = [ops.stop_gradient(ops.convert_to_tensor(each)) for each in self._states[index] or ()]
        wide = (ops.cast(each, _arithmetic_dtype(keras.backend.standardize_dtype(each.dtype))) for each in state)
        return list(zip(*map(_parts, wide), strict=True))

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
        dtype = _arithmetic_dtype(stored)
        gradient = ops.cast(gradient, dtype)
        if hasattr(gradient, "dense_shape"):
            gradient = ops.add(ops.zeros_like(state[0]), gradient)
        scalars = learning_rate[_real(dtype)]
        if stored == "bfloat16" or self._rounds(variable):
            update: Callable[..., list[Any]] = _update_rounding
            fixed: tuple[Any, ...] = (self._rule, self._rounds(variable))
            decay = 1 - scalars[0] * self._own_decay(variable)
            scalars = (*scalars, decay, ops.convert_to_tensor(self._keys[index], "int32"), learning_rate["int32"])
        else:
            update, fixed = _update, (self._rule,)
            param = ops.cast(param, dtype)
        make = partial(_compiled, tuple(variable.shape)) if _is_better_compiled(variable) else partial
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
        self._assign_all("store", [store[name] for name in names])

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
        self._assign_all("weights", weights)

    def _assign_all(self, where: str, values: Sequence[Any]) -> None:
        pairs = list(zip(self.variables, values, strict=True))
        arrays = [_checked(f"{where}[{number}]", variable, value) for number, (variable, value) in enumerate(pairs)]
        for variable, array in zip(self.variables, arrays, strict=True):
            variable.assign(array)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, from which `from_config` makes an equal optimizer.

        Returns:
            The arguments by name, serializable.
        """
        return {**super().get_config(), **{name: getattr(self, name) for name in (*self._hyperparameter_names(), *_OPTIONS)}}


def _checked(what: str, variable: Any, value: Any) -> Any:
    """A value that is to be assigned, as an array of the backend's in the variable's dtype."""
    try:
        array = keras.ops.convert_to_numpy(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is {type(value).__name__}, but must be an array") from error
    if array.shape != tuple(variable.shape):
        raise ValueError(f"{what} has shape {array.shape}, but {variable.path} has {tuple(variable.shape)}")
    is_complex = keras.backend.standardize_dtype(variable.dtype).startswith("complex")
    # Of the name: bfloat16 is of no kind.
    if not any(kind in array.dtype.name for kind in ("float", "int", *(["complex"] if is_complex else []))):
        raise ValueError(f"{what} is of {array.dtype}, but must be of numbers that fit {variable.path} of {variable.dtype}")
    return ops.convert_to_tensor(array, dtype=variable.dtype)


class _Integers(rounding.Wrapping):
    """The integer namespace of Keras' backend, as `vsgd.rounding` wants one."""

    where = staticmethod(ops.where)

    @staticmethod
    def shift(i: Any, places: int) -> Any:
        return ops.right_shift(i, places) & (0xFFFFFFFF >> places)

    @staticmethod
    def bits(x: Any) -> Any:
        return _bitcast(x, "int32")

    @staticmethod
    def floats(i: Any) -> Any:
        return _bitcast(i, "float32")


def _bitcast(x: Any, dtype: str) -> Any:
    """The bits of an array as another dtype of the same size."""
    # Not `ops.view`, which Keras 3.10 lacks.
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.bitcast(x, dtype)
    return x.view(getattr(torch, dtype) if keras.backend.backend() == "torch" else dtype)


_make_key = rounding.make_key(_Integers)
_make_word = rounding.make_word(_Integers)
_to_bfloat16 = rounding.make_round(_Integers)


def _iota(shape: Sequence[int], dimension: int) -> Any:
    """The places along a dimension, in a shape that broadcasts."""
    return ops.reshape(ops.arange(shape[dimension], dtype="int32"), (shape[dimension], *[1] * (len(shape) - dimension - 1)))


def _state_dtype(variable: Any, wanted: str) -> str:
    """What is wanted, but for wide and complex variables: their state is of their own dtype.

    Half precision to the nearest holds neither b_g (it falls to 1e-8) nor its small changes, so no state follows it.
    """
    # Of the value: JAX without x64 has float32 values in float64 variables.
    dtype: str = keras.backend.standardize_dtype(ops.convert_to_tensor(variable).dtype)
    return dtype if dtype in ("float64", "complex64", "complex128") else wanted


def _arithmetic_dtype(stored: str) -> str:
    return "float32" if stored == "bfloat16" else stored


def _real(dtype: str) -> str:
    """The dtype of a number's parts."""
    return {"bfloat16": "float32", "complex64": "float32", "complex128": "float64"}.get(dtype, dtype)


def _parts(tensor: Any) -> tuple[Any, ...]:
    """The real tensors that are updated: a complex one is two."""
    is_complex = keras.backend.standardize_dtype(tensor.dtype).startswith("complex")
    return (ops.real(tensor), ops.imag(tensor)) if is_complex else (tensor,)


def _whole(parts: tuple[Any, ...]) -> Any:
    if len(parts) == 1:
        return parts[0]
    dtype = {"float32": "complex64", "float64": "complex128"}[keras.backend.standardize_dtype(parts[0].dtype)]
    real, imaginary = (ops.cast(part, dtype) for part in parts)
    return real + imaginary * 1j


def _update(rule: core.Rule, values: list[Any], lr: Any, coefficients: Any, decay: Any = 1.0) -> list[Any]:
    """The new variable and its new state, from the variable, its gradient and its state."""
    update = rule.make_update(ops)
    new = []
    for param, grad, *state in zip(*map(_parts, values), strict=True):
        direction, new_state = update(grad, tuple(state), coefficients)
        new.append((core.descend(param, direction, lr, decay), *new_state))
    return [_whole(parts) for parts in zip(*new, strict=True)]


def _update_rounding(
    rule: core.Rule, of_param: bool, values: list[Any], lr: Any, coefficients: Any, decay: Any, base: Any, step: Any
) -> list[Any]:
    """`_update` in float32 with bfloat16 rounded stochastically: state that is stored so, and the variable if `of_param`."""
    stored = keras.backend.standardize_dtype(values[-1].dtype)
    param, *state = _update(rule, [ops.cast(value, "float32") for value in values], lr, coefficients, decay)
    word = _make_word(rounding.places(param.shape, _iota), _make_key(base, step))

    def rounded(value: Any, place: int) -> Any:
        return ops.cast(_to_bfloat16(value, word, rounding.MULTIPLIERS[place]), "bfloat16")

    if stored == "bfloat16":
        state = [rounded(array, place) for place, array in enumerate(state)]
    return [rounded(param, len(state)) if of_param else param, *state]


def _is_better_compiled(variable: Any) -> bool:
    """Whether each operation would otherwise make an array in memory: on the CPU Keras has TensorFlow compile nothing."""
    return keras.backend.backend() == "tensorflow" and "CPU" in variable.device


@functools.cache
def _compiled(shape: tuple[int, ...], update: Callable[..., list[Any]], *fixed: Any) -> Callable[..., list[Any]]:
    # One for each shape, for TensorFlow warns of functions that it traces again and again.
    import tensorflow as tf

    compiled: Callable[..., list[Any]] = tf.function(partial(update, *fixed), autograph=False, jit_compile=True)
    return compiled


def _number(value: Any) -> float:
    return float(value if isinstance(value, Real) else ops.convert_to_tensor(value).item())


def _arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a constructor was given, from its `locals()`."""
    named = {name: value for name, value in arguments.items() if name not in ("self", "kwargs", "__class__")}
    return {**named, **arguments["kwargs"]}


@keras.saving.register_keras_serializable(package="vsgd")
class VSGD(_RuleOptimizer):
    """Variational stochastic gradient descent (Chen et al., TMLR 2025, arXiv 2404.06549).

    Each element of the gradient is a hidden quantity that a mini-batch shows with noise. Its posterior mean and variance are
    filtered step by step, with both noise levels learned, and the step is E[g] / sqrt(E[g^2]).

    State of each variable, among `variables`: `mu_g`, `b_g`, `b_ghat` (the variable's shape and layout; float64 for float64
    variables, complex for complex ones, else `state_dtype`). The count of steps is the optimizer's `iterations`, also for a
    variable that had no gradient in some of them.

    With `state_dtype="bfloat16"` what would be float32 state is stored as bfloat16, 6 bytes per element instead of 12, by
    stochastic rounding: up or down by chance, so that the mean is kept, and with it changes too small for bfloat16. The
    arithmetic stays float32. The chance is a hash of `seed`, the variable's place among the optimizer's, the step and the
    element's place in the variable: a run can be repeated and continued, and sharding changes nothing. With
    `stochastic_rounding=True` bfloat16 variables are rounded so too: weight decay and step are computed in float32 and rounded
    once, so that a decay by 1e-4, which bfloat16 cannot hold, is not lost.

    Args:
        learning_rate: the paper's eta, the step size: a float, a `keras.optimizers.schedules.LearningRateSchedule`, or a
            callable without arguments. Keras holds a float in its default float dtype: for float64 training,
            `keras.config.set_floatx("float64")` first. The authors' default is 0.1.
        variance_ratio: the paper's K_g, the prior of Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa1: how fast b_g forgets; its learning rate at step t is t ** -kappa1. In (0.5, 1].
        kappa2: the same for b_ghat.
        epsilon: added to the root of the second moment, in units of the gradient.
        weight_decay: decoupled weight decay, as in `keras.optimizers.AdamW`; None: none. On TensorFlow, Keras rounds a Python
            float to float32: for float64 training, give a `numpy.float64`.
        clipnorm: the gradient of each variable is scaled down to this norm.
        clipvalue: each element of the gradients is clipped to this size.
        global_clipnorm: all gradients together are scaled down to this norm.
        use_ema: keep an exponential moving average of the variables.
        ema_momentum: the average's momentum.
        ema_overwrite_frequency: after how many steps the variables become their average; None: at the end of training.
        loss_scale_factor: by what the loss is multiplied, and the gradients divided.
        gradient_accumulation_steps: of how many steps' gradients the mean is taken for one update.
        name: the optimizer's name.
        state_dtype: "float32", or "bfloat16" for state in half the memory.
        seed: an integer, what the noise of the rounding is drawn from.
        stochastic_rounding: whether bfloat16 variables are rounded stochastically.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        prior_shape: the shape of the prior on both precisions, without unit; None: `prior_strength`, as in the paper. With 0.0,
            `prior_strength` and `epsilon` can follow the loss's scale exactly: see `docs/tuning.md`.
        **kwargs: passed on to `keras.optimizers.Optimizer`.

    Raises:
        ValueError: a hyperparameter is out of its range, or `state_dtype` is another.

    Example:
        >>> import keras
        >>> from vsgd.keras import VSGD
        >>> weight = keras.Variable([1.0, -2.0])
        >>> optimizer = VSGD(learning_rate=0.05)
        >>> for _ in range(100):
        ...     optimizer.apply([2 * weight], [weight])  # the gradient of sum(weight ** 2)
        >>> bool((weight.numpy() ** 2).sum() < 1)  # from 5
        True
    """

    _kind = core.VSGD

    def __init__(
        self,
        learning_rate: LearningRate = 0.01,
        variance_ratio: float = 30.0,
        prior_strength: float = 1e-8,
        kappa1: float = 0.81,
        kappa2: float = 0.9,
        epsilon: float = 1e-8,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "vsgd",
        *,
        state_dtype: str = "float32",
        seed: int = 0,
        stochastic_rounding: bool = False,
        outlier_threshold: float | None = None,
        prior_shape: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**_arguments(locals()))


@keras.saving.register_keras_serializable(package="vsgd")
class ConstantVSGD(_RuleOptimizer):
    """VSGD with one precision for drift and noise (arXiv 2404.06549, the paper's second variant): Adam's memory.

    The gain is constant, `1 / (variance_ratio + 1)`, so `mu_g` is Adam's first moment with
    `beta_1 = variance_ratio / (variance_ratio + 1)`.

    State of each variable, among `variables`: `mu_g`, `b` (the variable's shape and layout; float64 for float64 variables,
    complex for complex ones, else `state_dtype`: see `VSGD`). The count of steps is the optimizer's `iterations`, also for a
    variable that had no gradient in some of them.

    Args:
        learning_rate: the paper's eta, the step size: a float, a `keras.optimizers.schedules.LearningRateSchedule`, or a
            callable without arguments. Keras holds a float in its default float dtype: for float64 training,
            `keras.config.set_floatx("float64")` first.
        variance_ratio: the paper's K_g, the fixed ratio Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa: how fast b forgets; its learning rate at step t is t ** -kappa. In (0.5, 1].
        epsilon: added to the root of the second moment, in units of the gradient.
        weight_decay: decoupled weight decay, as in `keras.optimizers.AdamW`; None: none. On TensorFlow, Keras rounds a Python
            float to float32: for float64 training, give a `numpy.float64`.
        clipnorm: the gradient of each variable is scaled down to this norm.
        clipvalue: each element of the gradients is clipped to this size.
        global_clipnorm: all gradients together are scaled down to this norm.
        use_ema: keep an exponential moving average of the variables.
        ema_momentum: the average's momentum.
        ema_overwrite_frequency: after how many steps the variables become their average; None: at the end of training.
        loss_scale_factor: by what the loss is multiplied, and the gradients divided.
        gradient_accumulation_steps: of how many steps' gradients the mean is taken for one update.
        name: the optimizer's name.
        state_dtype: "float32", or "bfloat16" for state in half the memory: see `VSGD`.
        seed: an integer, what the noise of the rounding is drawn from.
        stochastic_rounding: whether bfloat16 variables are rounded stochastically: see `VSGD`.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        prior_shape: the shape of the prior on the precision, without unit; None: `prior_strength`, as in the paper. With 0.0,
            `prior_strength` and `epsilon` can follow the loss's scale exactly: see `docs/tuning.md`.
        **kwargs: passed on to `keras.optimizers.Optimizer`.

    Raises:
        ValueError: a hyperparameter is out of its range, or `state_dtype` is another.

    Example:
        >>> import keras
        >>> from vsgd.keras import ConstantVSGD
        >>> weight = keras.Variable([1.0, -2.0], name="weight")
        >>> optimizer = ConstantVSGD(learning_rate=0.1)
        >>> optimizer.apply([2 * weight], [weight])
        >>> [variable.name for variable in optimizer.variables]
        ['iteration', 'learning_rate', 'weight_mu_g', 'weight_b']
    """

    _kind = core.CONSTANT_VSGD

    def __init__(
        self,
        learning_rate: LearningRate = 0.01,
        variance_ratio: float = 3.0,
        prior_strength: float = 1e-8,
        kappa: float = 0.9,
        epsilon: float = 1e-8,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "constant_vsgd",
        *,
        state_dtype: str = "float32",
        seed: int = 0,
        stochastic_rounding: bool = False,
        outlier_threshold: float | None = None,
        prior_shape: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**_arguments(locals()))
