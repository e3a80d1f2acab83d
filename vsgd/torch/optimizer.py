"""What VSGD and ConstantVSGD for torch share: everything but the rule and its hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _get_capturable_supported_devices,
    _get_scalar_dtype,
    _use_grad_for_differentiable,
)

from vsgd import core, rounding
from vsgd.backends.torch.dispatch import (
    FLAGS,
    FUSED,
    check_installed,
    fused_engine,
    hyperparameter_numbers,
    may_fuse,
    number,
    split_for_batches,
    step_batch,
    step_by_numbers,
    step_by_tensors,
)
from vsgd.backends.torch.leaves import Leaf, leaf_of, state_dtype
from vsgd.outliers import rule_of
from vsgd.posterior import NoiseScales, Posterior
from vsgd.torch import checkpoints
from vsgd.torch import posterior as torch_posterior
from vsgd.torch.checkpoints import check_form, hide_tensors, show_tensors

# What groups of older checkpoints lack.
_ADDED = {"state_dtype": "float32", "stochastic_rounding": False, "seed": 0, "outlier_threshold": None, "prior_shape": None}


class RuleOptimizer(Optimizer):
    """An optimizer by whatever rule a subclass names."""

    _kind: ClassVar[core.Rule]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._check_group(defaults)
        self._plans: dict[int, tuple[Any, Any]] = {}  # by group: what its leaves' noise is made of, and how to step them
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if group["foreach"] and not group["capturable"]:
                raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        core.validate_flags(**{name: group[name] for name in (*FLAGS, "stochastic_rounding") if name in group})
        names = ("lr", "weight_decay", "seed", *self._rule_of(group).hyperparameters._fields)
        core.validate(**{name: group[name] for name in names})
        core.validate_state_dtype(group["state_dtype"])
        if group["foreach"] and group["differentiable"]:
            raise RuntimeError("`foreach` does not support `differentiable`")
        if group["fused"]:
            if group["differentiable"]:
                raise RuntimeError("`fused` does not support `differentiable`")
            if group["foreach"]:
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    def _rule_of(self, group: dict[str, Any]) -> core.Rule:
        return rule_of(self._kind, group["outlier_threshold"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: the parameters, and what options differ from the optimizer's own.

        Raises:
            ValueError: an option is out of its range, or a parameter in another group. Nothing was changed.
            RuntimeError: flags that exclude each other.
            ImportError: `fused=True`, and the package of the engine is missing.
        """
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        if added["fused"]:
            try:  # only now, for the base class lists parameters of all forms
                check_installed(param.device.type for param in added["params"])
            except ImportError:
                self.param_groups.pop()
                raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}  # never copied or saved: addresses are of this process and of these tensors
        for group in self.param_groups:
            for name, value in {**FLAGS, **_ADDED, **self.defaults}.items():
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
            ValueError: it is none, has other groups or parameters, or the state of another optimizer. Nothing was changed. The
                arrays' values are not looked at.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(f"state_dict is {type(state_dict).__name__}, but must be a dict with state and param_groups")
        # The base class casts every tensor it sees to the parameter's dtype: show it none. As hooks, so that a user's hooks
        # before and after see the plain state.
        before = self.register_load_state_dict_pre_hook(lambda _, loaded: self._before_loading(loaded))
        after = self.register_load_state_dict_post_hook(show_tensors, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _before_loading(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What to load, or an error, before anything has changed."""
        check_form(state_dict, self.param_groups)
        state_dict = hide_tensors(checkpoints.translate(state_dict), self.param_groups, self._kind, type(self).__name__)
        for group in state_dict["param_groups"]:
            self._check_group({**self.defaults, **group})
        return state_dict

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Collect what has a gradient, and make its state at the first one; `torch.compile` knows this method by its name."""
        self._check_params(group)  # once more, for the compiler runs this method alone
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if len(state) == 0:
                self._init_state(group, param, state)
            params.append(param)
            grads.append(param.grad)
            steps.append(state["step"])
            for name, tensors in zip(self._kind.state_names, states, strict=True):
                tensors.append(state[name])

    def _check_params(self, group: dict[str, Any]) -> None:
        """Refuse parameters that no step can take as the group's flags ask, before anything has changed."""
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            if group["fused"] and param.device.type not in FUSED:
                device = param.device.type
                raise RuntimeError(
                    f"`fused=True` requires all the params to be on supported devices: {[*FUSED]} but one is on {device}"
                )
            if group["differentiable"] and getattr(self.state.get(param, {}).get("step"), "requires_grad", False):
                raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")

    def _check_engines(self, group: dict[str, Any]) -> None:
        """Refuse a group whose engine cannot be had, or cannot run where the group's tensors are."""
        params = [param for param in group["params"] if param.grad is not None]
        if group["fused"]:
            for device in {param.device.type for param in params}:
                fused_engine(group, device, batches=FUSED[device].batches)
        if group["capturable"]:
            supported = _get_capturable_supported_devices()
            for param in params:
                step = self.state.get(param, {}).get("step", param)
                if param.device.type != step.device.type or param.device.type not in supported:
                    raise AssertionError(
                        f"If capturable=True, params and state_steps must be on supported devices: {supported}."
                    )

    def _init_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Tensor]) -> None:
        state["step"] = self._step_count(group, param, 0.0)
        initial = self._kind.initial_state(hyperparameter_numbers(self._kind, group))
        for name, value in zip(self._kind.state_names, initial, strict=True):
            fill = complex(value, value) if param.is_complex() else value
            state[name] = torch.full_like(
                param,
                fill,
                dtype=state_dtype(param, group["state_dtype"]),
                memory_format=torch.preserve_format,
                requires_grad=False,
            )

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse, or a parameter where `fused=True` has no engine. As with all that follow, no
                parameter was stepped and no state made.
            ImportError: the engine of `fused=True` is missing.
            AssertionError: `capturable=True` on a device without graphs.
        """
        self._accelerator_graph_capture_health_check()

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        compiling = torch.compiler.is_compiling()
        plans = [None if compiling else self._valid_plan(index, group) for index, group in enumerate(self.param_groups)]
        rests = [
            group if plan is None else {**group, "params": plan.others}
            for group, plan in zip(self.param_groups, plans, strict=True)
        ]
        # All groups before any is stepped. Compiled code steps none before it has collected them all.
        if not compiling:
            for rest in rests:
                self._check_params(rest)
        only_init = self._is_dry_run()
        if not (compiling or only_init):
            for rest in rests:
                self._check_engines(rest)
        collected = [self._collect(rest) for rest in rests]
        for index, (group, plan, found) in enumerate(zip(self.param_groups, plans, collected, strict=True)):
            if plan is not None:
                step_batch(self._rule_of(group), group, plan.batch)
            if found[0] and not only_init:
                self._step_group(index, group, *found)
        return loss

    def posterior(self, param: Tensor) -> Posterior:
        """What is known of a parameter's gradient: the uncertainty of the gradient, not of the weights.

        Args:
            param: a parameter of this optimizer that has been stepped.

        Returns:
            Tensors of the parameter's shape, on its device, float64 for float64 parameters, else float32; copies.

        Raises:
            ValueError: the parameter is not this optimizer's, or has no state yet.
        """
        return torch_posterior.posterior_of(self._kind, self.param_groups, self.state, param)

    def noise_scale(self, *, batch_size: float) -> NoiseScales:
        """The gradient noise scale (arXiv 1812.06162) of all parameters that have been stepped.

        See `vsgd.posterior.noise_scale` for how it is estimated. No value is read back from a device, but sharded tensors are
        summed over all processes: every process must call it.

        Args:
            batch_size: how many examples a gradient is the mean of, in all processes and accumulated steps together.

        Returns:
            The estimates overall and, in `tensors`, by parameter; 0-d tensors.

        Raises:
            ValueError: `batch_size` is out of its range, or no parameter has been stepped.
        """
        return torch_posterior.noise_scales(self._kind, self.param_groups, self.state, batch_size)

    def surprise(self) -> dict[Tensor, Tensor]:
        """How unexpected the gradients are that the next step will take, averaged over each parameter: see `vsgd.posterior`.

        Returns:
            For each parameter with a gradient and state the mean of its squared standardized innovations, a 0-d tensor; near
            1 where the model fits, large at a spike of the loss.
        """
        return torch_posterior.surprises(self._kind, self.param_groups, self.state)

    def _valid_plan(self, index: int, group: dict[str, Any]) -> Any:
        """How to step again what was stepped fused the last time, where that may be done."""
        noise, plan = self._plans.get(index, (None, None))
        if plan is None or (noise == _noise_of(group) and may_fuse(group) and plan.renew(group["params"], self.state)):
            return plan
        del self._plans[index]
        return None

    def _collect(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[list[Tensor]]]:
        """Parameters with a gradient, their gradients, step counts and, by name, states."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        steps: list[Tensor] = []
        states: list[list[Tensor]] = [[] for _ in self._kind.state_names]
        self._init_group(group, params, grads, steps, *states)
        return params, grads, steps, states

    def _is_dry_run(self) -> bool:
        """Whether this is how `torch.distributed.checkpoint` makes the state: a first step, at lr 0, with zero gradients."""
        if torch.compiler.is_compiling() or self.state or any(number(group["lr"]) != 0 for group in self.param_groups):
            return False
        params = (param for group in self.param_groups for param in group["params"])
        return not any(param.grad is not None and _has_nonzero(param.grad) for param in params)

    def _step_group(
        self,
        index: int,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],
        states: list[list[Tensor]],
    ) -> None:
        keys = self._base_keys(index, group, params)
        rounds = group["stochastic_rounding"]
        leaves = [
            leaf_of(param, grad, tuple(state), key, rounds)
            for param, grad, key, *state in zip(params, grads, keys, *states, strict=True)
        ]
        if torch.compiler.is_compiling() or group["capturable"] or group["differentiable"]:
            step_by_tensors(self._rule_of(group), group, leaves, steps)
            return
        step_by_numbers(self._rule_of(group), group, *self._step_fused(index, group, params, leaves, steps))

    def _base_keys(self, index: int, group: dict[str, Any], params: list[Tensor]) -> list[int | None]:
        """What the noise of each parameter is made of, where there is any."""
        if group["state_dtype"] == "float32" and not group["stochastic_rounding"]:
            return [None] * len(params)
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:index])
        place = {id(param): first + number for number, param in enumerate(group["params"])}
        return [rounding.base_key(group["seed"], place[id(param)]) for param in params]

    def _step_fused(
        self, index: int, group: dict[str, Any], params: list[Tensor], leaves: list[Leaf], steps: list[Tensor]
    ) -> tuple[list[Leaf], list[Tensor]]:
        """Step what the fused engine can, and plan the next step; what is left."""
        fused, taken, left = split_for_batches(group, leaves, steps)
        if fused is None:
            return left
        given = set(map(id, params))
        own = [pair for pair in taken if id(pair[0].param) in given]
        views = [pair for pair in taken if id(pair[0].param) not in given]
        if own:
            batch = fused.Batch(*zip(*own, strict=True))
            step_batch(self._rule_of(group), group, batch)
            # Where there is a plan for others, this step has more than the last one: the next is to plan them together.
            if self._plans.pop(index, None) is None:
                plan = fused.make_plan(batch, group["params"], *zip(*own, strict=True), self._kind.state_names)
                self._plans[index] = _noise_of(group), plan
        if views:  # made anew in each step
            step_batch(self._rule_of(group), group, fused.Batch(*zip(*views, strict=True)))
        return left


def _noise_of(group: dict[str, Any]) -> tuple[Any, ...]:
    """What decides the noise that a group's leaves are rounded with."""
    return group["stochastic_rounding"], group["seed"]


def _has_nonzero(grad: Tensor) -> bool:
    """Whether any element of a gradient, on any process, is known not to be 0."""
    if grad.is_meta:
        return True
    return bool(torch_posterior.sum_of_shards(grad != 0))
