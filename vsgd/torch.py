"""VSGD as a `torch.optim.Optimizer`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

try:
    import torch
except ImportError as error:
    raise ImportError("vsgd.torch needs PyTorch: pip install 'vsgd[torch]'") from error

from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _get_capturable_supported_devices,
    _get_scalar_dtype,
    _to_scalar,
    _use_grad_for_differentiable,
)

from vsgd import checkpoints, core
from vsgd.backends import torch_foreach, torch_loop
from vsgd.backends.torch_blocks import Leaf, block_size, blocks, is_plain

__all__ = ["VSGD", "ConstantVSGD"]

_HAS_NUMBA = importlib.util.find_spec("numba") is not None


class _Fused(NamedTuple):
    """Where a device's fused engine is, and what it needs."""

    module: str
    package: str
    missing: str


_FUSED = {
    "cpu": _Fused("torch_fused", "numba", "fused=True needs numba: pip install 'vsgd[fused]'"),
    "cuda": _Fused("torch_triton", "triton", "fused=True on CUDA needs triton: pip install 'triton>=3.6'"),
}

#: `engine(rule, leaves, coefficients, lr, decay, maximize=...)` takes one step on all leaves.
Engine = Callable[..., None]

_FLAGS = {"foreach": None, "maximize": False, "capturable": False, "differentiable": False, "fused": None}


class _RuleOptimizer(Optimizer):
    """What VSGD and ConstantVSGD share: everything but the rule and its hyperparameters."""

    _rule: ClassVar[core.Rule]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._check_group(defaults)
        super().__init__(params, defaults)
        fused = {param.device.type for group in self.param_groups if group["fused"] for param in group["params"]}
        for engine in (_FUSED[device] for device in fused & _FUSED.keys()):
            if importlib.util.find_spec(engine.package) is None:
                raise ImportError(engine.missing)

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if group["foreach"] and not group["capturable"]:
                raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        names = ("lr", "weight_decay", *self._rule.hyperparameters._fields)
        core.validate(**{name: group[name] for name in names})
        if group["foreach"] and group["differentiable"]:
            raise RuntimeError("`foreach` does not support `differentiable`")
        if group["fused"]:
            if group["differentiable"]:
                raise RuntimeError("`fused` does not support `differentiable`")
            if group["foreach"]:
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in {**_FLAGS, **self.defaults}.items():
                group.setdefault(name, value)
            for param in group["params"]:
                param_state = self.state.get(param, {})
                if "step" in param_state and not isinstance(param_state["step"], Tensor):
                    param_state["step"] = self._step_count(group, param, float(param_state["step"]))

    @staticmethod
    def _step_count(group: dict[str, Any], param: Tensor, value: float) -> Tensor:
        # On the CPU unless a graph captures it: reading it back from an accelerator would wait for the device.
        device = param.device if group["capturable"] else "cpu"
        return torch.tensor(value, dtype=_get_scalar_dtype(), device=device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer's state, of this class, of the authors' VSGD, or of `pytorch_optimizer`'s.

        The state keeps its precision, whatever the parameters' dtype.

        Args:
            state_dict: what `state_dict()` returned.

        Raises:
            ValueError: it has other groups, or the state of another optimizer.
        """
        # The base class casts every tensor it sees to the parameter's dtype: show it none. As hooks, so that a user's hooks
        # before and after see the plain state.
        before = self.register_load_state_dict_pre_hook(_hide_tensors)
        after = self.register_load_state_dict_post_hook(_show_tensors, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Collect what has a gradient, and make its state at the first one; `torch.compile` knows this method by its name."""
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            state = self.state[param]
            if len(state) == 0:
                self._init_state(group, param, state)
            if group["differentiable"] and state["step"].requires_grad:
                raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
            params.append(param)
            grads.append(param.grad)
            steps.append(state["step"])
            for name, tensors in zip(self._rule.state_names, states, strict=True):
                tensors.append(state[name])

    def _init_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Tensor]) -> None:
        if group["fused"] and param.device.type not in _FUSED:
            device = param.device.type
            raise RuntimeError(
                f"`fused=True` requires all the params to be on supported devices: {[*_FUSED]} but one is on {device}"
            )
        state["step"] = self._step_count(group, param, 0.0)
        for name, value in zip(self._rule.state_names, self._rule.initial_state(self._hyper(group)), strict=True):
            fill = complex(value, value) if param.is_complex() else value
            state[name] = torch.full_like(
                param, fill, dtype=_state_dtype(param), memory_format=torch.preserve_format, requires_grad=False
            )

    def _hyper(self, group: dict[str, Any]) -> Any:
        hyperparameters = self._rule.hyperparameters
        return hyperparameters(*(group[name] for name in hyperparameters._fields))

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        self._accelerator_graph_capture_health_check()

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        only_init = self._is_dry_run()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            steps: list[Tensor] = []
            states: list[list[Tensor]] = [[] for _ in self._rule.state_names]
            self._init_group(group, params, grads, steps, *states)
            if params and not only_init:
                self._step_group(group, params, grads, steps, states)
        return loss

    def _is_dry_run(self) -> bool:
        """Whether this is how `torch.distributed.checkpoint` makes the state: a first step, at lr 0, with zero gradients."""
        if torch.compiler.is_compiling() or self.state or any(_number(group["lr"]) != 0 for group in self.param_groups):
            return False
        params = (param for group in self.param_groups for param in group["params"])
        return not any(param.grad is not None and _has_nonzero(param.grad) for param in params)

    def _step_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],
        states: list[list[Tensor]],
    ) -> None:
        leaves = [_leaf(param, grad, tuple(state)) for param, grad, *state in zip(params, grads, *states, strict=True)]
        if torch.compiler.is_compiling() or group["capturable"] or group["differentiable"]:
            if group["capturable"] and not torch.compiler.is_compiling():
                _check_capturable(leaves, steps)
            self._step_by_tensors(group, leaves, steps)
        else:
            self._step_by_numbers(group, leaves, steps)

    def _step_by_numbers(self, group: dict[str, Any], leaves: list[Leaf], steps: list[Tensor]) -> None:
        """Coefficients as numbers, computed once for all parameters of equal step count."""
        engines = _engines(group, leaves)
        torch._foreach_add_(steps, 1)
        hyper = self._hyper(group)
        lr = _number(group["lr"])
        decay = 1 - lr * group["weight_decay"]
        batches: dict[tuple[float, Engine, torch.device], list[Leaf]] = {}
        for leaf, step, engine in zip(leaves, steps, engines, strict=True):
            batches.setdefault((step.item(), engine, leaf.param.device), []).append(leaf)
        for (count, engine, _), batch in batches.items():
            coefficients = self._rule.coefficients(count, hyper)
            engine(self._rule, batch, coefficients, lr, decay, maximize=group["maximize"])

    def _step_by_tensors(self, group: dict[str, Any], leaves: list[Leaf], steps: list[Tensor]) -> None:
        """Coefficients as 0-d tensors beside the parameters: no value is read back to the host."""
        wants_fused = group["fused"] and not torch.compiler.is_compiling()
        fused = _fused(group, leaves[0].param.device.type) if wants_fused else None
        torch._foreach_add_(steps, 1)
        hyper = self._hyper(group)
        lr = _to_scalar(group["lr"])
        if fused is not None:
            leaves, steps = self._step_fused(fused, group, leaves, steps)
        # In the state's dtype: a power of a float32 count would cost a float64 run its accuracy.
        steps = [step.to(leaf.state[0].dtype) for step, leaf in zip(steps, leaves, strict=True)]
        if _wants_foreach(group, leaves):
            coefficients = self._rule.coefficients(torch_foreach.TensorList(steps), hyper)
            if isinstance(lr, Tensor):
                lr = torch_foreach.TensorList([lr] * len(leaves))
            decay = 1 - lr * group["weight_decay"]
            torch_foreach.step(self._rule, leaves, coefficients, lr, decay, maximize=group["maximize"])
            return
        decay = 1 - lr * group["weight_decay"]
        whole = torch.compiler.is_compiling() or group["differentiable"]
        for leaf, step in zip(leaves, steps, strict=True):
            coefficients = self._rule.coefficients(step, hyper)
            parts = [leaf] if whole else blocks(leaf, block_size(leaf))
            torch_loop.step(self._rule, parts, coefficients, lr, decay, maximize=group["maximize"])

    def _step_fused(
        self, engine: ModuleType, group: dict[str, Any], leaves: list[Leaf], steps: list[Tensor]
    ) -> tuple[list[Leaf], list[Tensor]]:
        """The leaves that the kernel takes, stepped by it on each device; the others are returned."""
        batches: dict[torch.device | None, list[tuple[Leaf, Tensor]]] = {None: []}
        for leaf, step in zip(leaves, steps, strict=True):
            device = leaf.param.device if engine.accepts(leaf) else None
            batches.setdefault(device, []).append((leaf, step))
        rest = batches.pop(None)
        lr = _to_scalar(group["lr"])
        for batch in batches.values():
            # In float64, as numbers are: of the kernel's scalars each is rounded once.
            counts = torch.stack([step for _, step in batch]).double()
            coefficients = self._rule.coefficients(counts, self._hyper(group))
            decay = 1 - lr * group["weight_decay"]
            engine.step(self._rule, [leaf for leaf, _ in batch], coefficients, lr, decay, maximize=group["maximize"])
        return [leaf for leaf, _ in rest], [step for _, step in rest]


class _Hidden:
    """A tensor that the base class's `load_state_dict` leaves alone."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _hide_tensors(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state as it will be, hidden; or an error, before anything has changed."""
    assert isinstance(optimizer, _RuleOptimizer)
    state_dict = checkpoints.translate(state_dict)
    params: dict[Any, Tensor] = {}
    for number, (saved, group) in enumerate(zip(state_dict["param_groups"], optimizer.param_groups, strict=False)):
        _check_present(optimizer, saved, optimizer._rule.hyperparameters._fields, f"param_groups[{number}]")
        optimizer._check_group({**optimizer.defaults, **saved})
        params.update(zip(saved["params"], group["params"], strict=False))
    states = state_dict["state"].items()
    hidden = {
        index: _hide_state(optimizer, index, params[index], state) if state else {}
        for index, state in states
        if index in params
    }
    return {**state_dict, "state": {**state_dict["state"], **hidden}}


def _hide_state(optimizer: _RuleOptimizer, index: Any, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    names = optimizer._rule.state_names
    _check_present(optimizer, state, ("step", *names), f"the state of parameter {index}")
    for name in names:
        shape = getattr(state[name], "shape", None)
        if shape != param.shape:
            raise ValueError(f"{name} of parameter {index} has shape {shape}, but the parameter has {tuple(param.shape)}")
    return {**state, **{name: _Hidden(_state_like(param, state[name])) for name in names}}


def _check_present(optimizer: Optimizer, given: dict[str, Any], names: Iterable[str], where: str) -> None:
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(
            f"state_dict is not of a {type(optimizer).__name__}: {where} has {', '.join(map(str, given))} "
            f"and lacks {', '.join(missing)}"
        )


def _state_like(param: Tensor, saved: Tensor) -> Tensor:
    """A saved state array where and how the parameter lies, never in less precision than the arithmetic's."""
    tensor = saved.to(device=param.device, dtype=_state_dtype(param))
    if is_plain(tensor) and tensor.stride() != param.stride():
        return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor


def _show_tensors(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, _Hidden):
                state[name] = value.tensor


def _state_dtype(param: Tensor) -> torch.dtype:
    """Half precision holds neither b_g (it falls to 1e-8) nor its small changes: state and arithmetic are float32 or more."""
    if param.is_complex():
        return torch.promote_types(param.dtype, torch.complex64)
    return torch.promote_types(param.dtype, torch.float32)


def _number(lr: float | Tensor) -> float:
    return lr.detach().item() if isinstance(lr, Tensor) else lr


def _has_nonzero(grad: Tensor) -> bool:
    """Whether any element of a gradient, on any process, is known not to be 0."""
    if grad.is_meta:
        return True
    nonzero = (grad != 0).sum()
    return bool(nonzero.full_tensor() if hasattr(nonzero, "full_tensor") else nonzero)


def _leaf(param: Any, grad: Any, state: tuple[Any, ...]) -> Leaf:
    """What the engines work on: this process's part of a sharded tensor, a complex number as two real ones."""
    if not is_plain(param) and hasattr(param, "to_local"):
        if getattr(grad, "placements", None) != param.placements:
            grad = grad.redistribute(param.device_mesh, param.placements)
        param, grad, *parts = (tensor.to_local() for tensor in (param, grad, *state))
        state = tuple(parts)
    if param.is_complex():
        # Of the gradient a conjugate is as good as any; a parameter that is one cannot be written to.
        param, grad, *parts = (torch.view_as_real(tensor) for tensor in (param, grad.resolve_conj(), *state))
        state = tuple(parts)
    return Leaf(param, grad, state)


def _loop(rule: core.Rule, leaves: Iterable[Leaf], *args: Any, **kwargs: Any) -> None:
    parts = (block for leaf in leaves for block in blocks(leaf, block_size(leaf)))
    torch_loop.step(rule, parts, *args, **kwargs)


def _engines(group: dict[str, Any], leaves: list[Leaf]) -> list[Engine]:
    """The engine for each leaf: what the user asked for, else the fastest there is; the loop where that cannot run."""
    fused = {device: _fused(group, device) for device in {leaf.param.device.type for leaf in leaves}}
    return [_engine(group, leaf, fused[leaf.param.device.type]) for leaf in leaves]


def _engine(group: dict[str, Any], leaf: Leaf, fused: ModuleType | None) -> Engine:
    if fused is not None and fused.accepts(leaf):
        return fused.step
    return torch_foreach.step if _wants_foreach(group, [leaf]) else _loop


def _fused(group: dict[str, Any], device: str) -> ModuleType | None:
    """The fused engine of a type of device, where it is wanted and can be had."""
    automatic = device == "cpu" and _HAS_NUMBA and _is_automatic(group)
    if device not in _FUSED or not (group["fused"] or automatic):
        return None
    engine = _import_fused(device)
    if isinstance(engine, ModuleType):
        return engine
    if group["fused"]:
        raise ImportError(_FUSED[device].missing) from engine
    return None


@functools.cache
def _import_fused(device: str) -> ModuleType | ImportError:
    # At the first use, and not above: importing numba takes half a second.
    try:
        return importlib.import_module(f"vsgd.backends.{_FUSED[device].module}")
    except ImportError as error:
        return error


def _wants_foreach(group: dict[str, Any], leaves: Iterable[Leaf]) -> bool:
    if _is_automatic(group):
        return not group["differentiable"] and all(leaf.param.is_cuda and is_plain(leaf.param) for leaf in leaves)
    return bool(group["foreach"])


def _is_automatic(group: dict[str, Any]) -> bool:
    return group["foreach"] is None and group["fused"] is None


def _check_capturable(leaves: list[Leaf], steps: list[Tensor]) -> None:
    supported = _get_capturable_supported_devices()
    for leaf, step in zip(leaves, steps, strict=True):
        device = leaf.param.device.type
        if device != step.device.type or device not in supported:
            raise AssertionError(f"If capturable=True, params and state_steps must be on supported devices: {supported}.")


def _defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    """The group options among a constructor's `locals()`."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


class VSGD(_RuleOptimizer):
    """Variational stochastic gradient descent (Chen et al., TMLR 2025, arXiv 2404.06549).

    Each element of the gradient is a hidden quantity that a mini-batch shows with noise. Its posterior mean and variance are
    filtered step by step, with both noise levels learned, and the step is E[g] / sqrt(E[g^2]).

    State of each parameter: `step` (a 0-d tensor), `mu_g`, `b_g`, `b_ghat` (the parameter's shape and layout; float64 for
    float64 parameters, else float32).

    Args:
        params: tensors, named tensors or groups, as for every torch optimizer.
        lr: the paper's eta, the step size; the authors' default is 0.1.
        variance_ratio: the paper's K_g, the prior of Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa1: how fast b_g forgets; its learning rate at step t is t ** -kappa1. In (0.5, 1].
        kappa2: the same for b_ghat.
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: decoupled weight decay, as in AdamW, applied before the step.
        foreach: run on lists of tensors; None: on CUDA.
        maximize: maximize the objective instead of minimizing it.
        capturable: whether a CUDA graph may capture the step; the step counts then live on the device.
        differentiable: whether autograd may run through the step.
        fused: run one kernel for all parameters, numba's on the CPU, Triton's on CUDA; None: on the CPU where numba is
            installed.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: flags that exclude each other.
        ImportError: `fused=True` without numba on the CPU, or without Triton on CUDA.

    Example:
        >>> import torch
        >>> from vsgd.torch import VSGD
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = VSGD([weight], lr=0.05)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = weight.square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        >>> loss.item() < 1  # from 5
        True
    """

    _rule = core.VSGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        variance_ratio: float = 30.0,
        prior_strength: float = 1e-8,
        kappa1: float = 0.81,
        kappa2: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, _defaults(locals()))


class ConstantVSGD(_RuleOptimizer):
    """VSGD with one precision for drift and noise (arXiv 2404.06549, the paper's second variant): Adam's memory.

    The gain is constant, `1 / (variance_ratio + 1)`, so `mu_g` is Adam's first moment with
    `beta1 = variance_ratio / (variance_ratio + 1)`.

    State of each parameter: `step` (a 0-d tensor), `mu_g`, `b` (the parameter's shape and layout; float64 for float64
    parameters, else float32).

    Args:
        params: tensors, named tensors or groups, as for every torch optimizer.
        lr: the paper's eta, the step size.
        variance_ratio: the paper's K_g, the fixed ratio Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa: how fast b forgets; its learning rate at step t is t ** -kappa. In (0.5, 1].
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: decoupled weight decay, as in AdamW, applied before the step.
        foreach: run on lists of tensors; None: on CUDA.
        maximize: maximize the objective instead of minimizing it.
        capturable: whether a CUDA graph may capture the step; the step counts then live on the device.
        differentiable: whether autograd may run through the step.
        fused: run one kernel for all parameters, numba's on the CPU, Triton's on CUDA; None: on the CPU where numba is
            installed.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: flags that exclude each other.
        ImportError: `fused=True` without numba on the CPU, or without Triton on CUDA.

    Example:
        >>> import torch
        >>> from vsgd.torch import ConstantVSGD
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = ConstantVSGD([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['b', 'mu_g', 'step']
    """

    _rule = core.CONSTANT_VSGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        variance_ratio: float = 3.0,
        prior_strength: float = 1e-8,
        kappa: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, _defaults(locals()))
