"""The torch optimizer of any rule: it checks groups, collects gradients and state, and passes them to the stepper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from vsgd import core
from vsgd.backends.torch.dispatch import FUSED, Collected, Stepper, check_fused, load_fused
from vsgd.backends.torch.leaves import StepOptions, choose_state_dtype
from vsgd.backends.torch.private import (
    check_graph_capture,
    choose_count_dtype,
    list_capturable_devices,
    make_0d,
    run_with_grad_mode,
)
from vsgd.outliers import choose_rule
from vsgd.prior import is_auto
from vsgd.torch.checkpoints import check_form, hide_tensors, show_tensors, translate_checkpoint
from vsgd.torch.posterior import PosteriorMixin, get_unit, sum_shards
from vsgd.torch.prior import measure_gradients
from vsgd.validation import validate_flags, validate_numbers, validate_state_dtype

_FLAGS = ("foreach", "maximize", "capturable", "differentiable", "fused", "stochastic_rounding")

# The values of options that groups of older checkpoints lack.
_OLD_DEFAULTS = {
    "foreach": None,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "state_dtype": "float32",
    "stochastic_rounding": False,
    "seed": 0,
    "outlier_threshold": None,
    "prior_shape": None,
    "forgetting_floor": 0.0,
    "gradient_unit": None,
}


class RuleOptimizer(PosteriorMixin, Optimizer):
    """The code that VSGD and ConstantVSGD share: everything but the rule and its hyperparameters."""

    _plain_rule: ClassVar[core.Rule]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        defaults = {**defaults, "gradient_unit": None}
        self._check_group(defaults)
        self._stepper = Stepper(self._plain_rule.state_names)
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if group["foreach"] and not group["capturable"]:
                raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        validate_flags(**{name: group[name] for name in _FLAGS if name in group})
        rule = choose_rule(self._plain_rule, group["outlier_threshold"])
        names = ("lr", "weight_decay", "seed", "gradient_unit", *rule.hyperparameters._fields)
        validate_numbers(Tensor, **{name: _read_if_known(group[name]) for name in names})
        validate_state_dtype(group["state_dtype"])
        if group["foreach"] and group["differentiable"]:
            raise RuntimeError("`foreach` does not support `differentiable`")
        if group["fused"]:
            if group["differentiable"]:
                raise RuntimeError("`fused` does not support `differentiable`")
            if group["foreach"]:
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: the parameters, and the options that differ from the optimizer's defaults.

        Raises:
            ValueError: an option is out of its range, or a parameter is in another group. Nothing has changed.
            RuntimeError: two flags exclude each other.
            ImportError: `fused=True`, and the package of the engine is missing.
        """
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        if added["fused"]:
            try:  # after the base class, which makes a list of all forms of parameters
                check_fused(param.device.type for param in added["params"])
            except ImportError:
                self.param_groups.pop()
                raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Plans are never copied or saved: their addresses belong to this process and these tensors.
        self._stepper = Stepper(self._plain_rule.state_names)
        for group in self.param_groups:
            for name, value in {**_OLD_DEFAULTS, **self.defaults}.items():
                group.setdefault(name, value)
            for param in group["params"]:
                param_state = self.state.get(param, {})
                if "step" in param_state and not isinstance(param_state["step"], Tensor):
                    param_state["step"] = self._make_step_count(group, param, float(param_state["step"]))

    @staticmethod
    def _make_step_count(group: dict[str, Any], param: Tensor, value: float) -> Tensor:
        # On the CPU unless a graph captures it: reading it back from an accelerator would wait for the device.
        device = param.device if group["capturable"] else "cpu"
        return torch.tensor(value, dtype=choose_count_dtype(), device=device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer of this class, of the authors' VSGD, or of `pytorch_optimizer`'s.

        The state keeps its precision, whatever the parameters' dtype.

        Args:
            state_dict: a dict that `state_dict()` returned.

        Raises:
            ValueError: the dict has another form, other groups or parameters, or the state of another optimizer. Nothing has
                changed. The values of the arrays are not checked.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(f"state_dict is {type(state_dict).__name__}, but must be a dict with state and param_groups")
        # The base class casts every tensor that it sees to the parameter's dtype, so the tensors are hidden from it. Hooks hide
        # them, so that a user's hooks before and after see the plain state.
        before = self.register_load_state_dict_pre_hook(lambda _, loaded: self._prepare_loading(loaded))
        after = self.register_load_state_dict_post_hook(show_tensors, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _prepare_loading(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state to load, or raise an error before anything has changed."""
        check_form(state_dict, self.param_groups)
        state_dict = hide_tensors(translate_checkpoint(state_dict), self.param_groups, self._plain_rule, type(self).__name__)
        for group in state_dict["param_groups"]:
            self._check_group({**self.defaults, **group})
        return state_dict

    @run_with_grad_mode
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: a function that reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse, or `fused=True` does not support a parameter's device. After this and the
                following errors, no parameter has been stepped and no state made.
            ImportError: the engine of `fused=True` is missing.
            AssertionError: `capturable=True` on a device without graphs.
        """
        check_graph_capture(self)

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        if any(is_auto(group["prior_strength"]) for group in self.param_groups) and not self._calibrate():
            return loss
        options = [self._read_options(group) for group in self.param_groups]
        if torch.compiler.is_compiling():
            # The compiler recognizes `_init_group` and its arguments, which must be the optimizer's own groups.
            unplanned = self.param_groups
            dry_run = False
        else:
            unplanned = [
                self._stepper.exclude_planned(index, group, options[index], self.state)
                for index, group in enumerate(self.param_groups)
            ]
            # All groups are checked before any of them is stepped.
            for group in unplanned:
                self._check_params(group)
            dry_run = self._is_dry_run()
            if not dry_run:
                for group in unplanned:
                    self._check_engines(group)
        collected = [self._collect(group) for group in unplanned]
        if not dry_run:
            for index, found in enumerate(collected):
                self._stepper.step(index, self.param_groups, options[index], found)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _calibrate(self) -> bool:
        """Measure the unit of the groups with "auto" at the first step, and return whether there is one."""
        groups = [group for group in self.param_groups if is_auto(group["prior_strength"])]
        units = {group["gradient_unit"] for group in groups}
        if None not in units:
            return True
        if units == {None}:
            for group in self.param_groups:
                self._check_params(group)
            if self._is_dry_run():
                return True
            for group in self.param_groups:
                self._check_engines(group)
            params = [param for group in groups for param in group["params"] if param.grad is not None]
            if any(param.is_cuda for param in params) and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "prior_strength='auto' calibrates at the first step: take it before a CUDA graph is captured"
                )
            units.add(measure_gradients(params) or None)
        # A group that was added late has the unit of the others.
        unit = max((unit for unit in units if unit is not None), default=None)
        for group in groups:
            group["gradient_unit"] = unit
        return unit is not None

    def _read_options(self, group: dict[str, Any]) -> StepOptions:
        rule = choose_rule(self._plain_rule, group["outlier_threshold"])
        on_device = torch.compiler.is_compiling() or bool(group["capturable"] or group["differentiable"])
        # NumPy's numbers would compute in their own precision.
        rates = group["lr"], group["weight_decay"]
        lr, weight_decay = (rate if isinstance(rate, Tensor) else float(rate) for rate in rates)
        return StepOptions(
            rule,
            rule.select_hyperparameters(group),
            make_0d(lr) if on_device else lr,
            weight_decay,
            grad_scale=(-1 if group["maximize"] else 1) / get_unit(group),
            foreach=group["foreach"],
            fused=group["fused"],
            differentiable=group["differentiable"],
            on_device=on_device,
        )

    def _check_params(self, group: dict[str, Any]) -> None:
        """Raise an error for parameters that no step can take under the group's flags."""
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
        """Raise an error for a group whose engine is missing, or cannot run on the devices of the group's tensors."""
        params = [param for param in group["params"] if param.grad is not None]
        if group["fused"]:
            for device_type in {param.device.type for param in params}:
                load_fused(device_type, required=True)
        if group["capturable"]:
            supported = list_capturable_devices()
            for param in params:
                step = self.state.get(param, {}).get("step", param)
                if param.device.type != step.device.type or param.device.type not in supported:
                    raise AssertionError(
                        f"If capturable=True, params and state_steps must be on supported devices: {supported}."
                    )

    def _is_dry_run(self) -> bool:
        """Return whether `torch.distributed.checkpoint` makes the state: by a first step at lr 0 with zero gradients."""
        if self.state or any(_read_number(group["lr"]) != 0 for group in self.param_groups):
            return False
        grads = (param.grad for group in self.param_groups for param in group["params"] if param.grad is not None)
        return not any(grad.is_meta or bool(sum_shards(grad != 0)) for grad in grads)

    def _collect(self, group: dict[str, Any]) -> Collected:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        counts: list[Tensor] = []
        states: list[list[Tensor]] = [[] for _ in self._plain_rule.state_names]
        self._init_group(group, params, grads, counts, *states)
        return Collected(params, grads, counts, states)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        counts: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Collect parameters with a gradient, and make the state of new ones. `torch.compile` runs this method by its name."""
        self._check_params(group)  # again, because the compiler runs this method alone
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if "step" not in state:  # a wrapper may keep its own values there
                state.update(self._make_state(group, param))  # at once: an error leaves none of it
            params.append(param)
            grads.append(param.grad)
            counts.append(state["step"])
            for name, tensors in zip(self._plain_rule.state_names, states, strict=True):
                tensors.append(state[name])

    def _make_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        rule = self._plain_rule
        initial = rule.initial_state(rule.hyperparameters(*map(_read_number, rule.select_hyperparameters(group))))
        state = {"step": self._make_step_count(group, param, 0.0)}
        for name, value in zip(rule.state_names, initial, strict=True):
            state[name] = torch.full_like(
                param,
                complex(value, value) if param.is_complex() else value,
                dtype=choose_state_dtype(param, group["state_dtype"]),
                memory_format=torch.preserve_format,
                requires_grad=False,
            )
        return state


def _read_if_known(value: Any) -> Any:
    """Return the number of a tensor of one element that is in reach, the text of one that never has a number.

    Reading a tensor on an accelerator would wait for it, and reading a traced one would break the trace.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        return value
    if value.is_meta or value.layout is not torch.strided:
        return repr(value)
    known = type(value) in (Tensor, torch.nn.Parameter) and value.device.type == "cpu"
    return _read_number(value) if known else value.reshape(())


def _read_number(value: Any) -> Any:
    return value.detach().item() if isinstance(value, Tensor) else value
