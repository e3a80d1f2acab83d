"""Watch the gradients of any torch optimizer: see `vsgd.observer`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from vsgd import observer
from vsgd.observer import Hyperparameters, Innovations, State
from vsgd.posterior import Posterior

# Small tensors are joined up to this many watched elements: what fits into a core's cache, and few launches elsewhere.
_CPU_BLOCK, _ACCELERATOR_BLOCK = 2**16, 2**24

_OPS: Any = torch
_update = observer.make_update(_OPS)


class Watched:
    """A watched parameter.

    Attributes:
        name: its name.
        param: the parameter.
        elements: the flat indices of the watched numbers, or None for all; a complex number counts as two.
        numbers: how many numbers the parameter has; of a sharded one, on this process.
        size: how many of them are watched.
        step: how many gradients were observed.
        state: views into the block's state, 1-D.
        innovations: those of the last gradient, 0-d, or None before the second one.
    """

    def __init__(self, name: str, param: Tensor, elements: Tensor | None, numbers: int, state: State) -> None:
        self.name = name
        self.param = param
        self.elements = elements
        self.numbers = numbers
        self.size: int = state.mean.numel()
        self.step = 0
        self.state = state
        self.innovations: Innovations | None = None

    def gather(self, grad_scale: Tensor | None) -> Tensor:
        """Return the watched numbers of the gradient, in the state's dtype."""
        numbers = _get_numbers(self.param.grad)
        watched = numbers if self.elements is None else numbers.index_select(0, self.elements)
        wide = watched.to(self.state.mean.dtype)
        return wide if grad_scale is None else wide / grad_scale


class Block(NamedTuple):
    """Watched parameters of one device and dtype.

    Attributes:
        members: the parameters.
        state: their state, joined to vectors.
        sizes: the numbers of watched elements of the members from one index to another, on the device.
    """

    members: list[Watched]
    state: State
    sizes: dict[tuple[int, int], Tensor]


class GradientObserver:
    """Estimate each gradient element's mean, noise and drift while any optimizer trains.

    The observer filters the gradients and changes no parameters. It learns its gain from the gradients, so that noise and
    intervals are right where gradients change slowly; read them after a few hundred steps. `docs/uncertainty.md` measures
    how far to trust them.

    Create the observer after the model is on its device, and after any sharding. With sharded parameters each process watches
    its own shards. A parameter without gradient is left out of a step. Gradients that are not finite change nothing.

    Args:
        named_parameters: names and parameters, as from `model.named_parameters()`, real or complex.
        max_elements: the largest number of watched elements of one tensor, a fixed random choice; None: all. The memory is 20
            bytes for each watched element, 16 where all are watched.
        gain_rate: the learning rate of the gains, in (0, 1): see `vsgd.observer.Hyperparameters`.
        forgetting_floor: the smallest learning rate of the innovations' variance, in [0, 1).
        seed: an integer, the seed of the choice of elements.

    Raises:
        TypeError: `named_parameters` holds no pairs of a name and a tensor.
        ValueError: a name occurs twice, a tensor has no floating or complex numbers, or an option is out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = torch.optim.AdamW([weight], lr=0.0)
        >>> observer = GradientObserver([("weight", weight)])
        >>> handle = observer.attach(optimizer)
        >>> noise = torch.Generator().manual_seed(0)
        >>> for _ in range(500):
        ...     weight.grad = torch.tensor([3.0, 0.0]) + torch.randn(2, generator=noise)
        ...     optimizer.step()
        >>> posterior = observer.posterior(weight)
        >>> posterior.mean.round(decimals=0).tolist(), posterior.noise_variance.round(decimals=0).tolist()
        ([3.0, 0.0], [1.0, 1.0])
        >>> handle.remove()
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        max_elements: int | None = 16384,
        gain_rate: float = 0.003,
        forgetting_floor: float = 0.01,
        seed: int = 0,
    ) -> None:
        self._hyper = Hyperparameters(gain_rate, forgetting_floor)
        observer.validate_options(max_elements, seed, self._hyper)
        named = [_check_pair(pair) for pair in named_parameters]
        if repeated := sorted({name for name, _ in named if sum(name == each for each, _ in named) > 1}):
            raise ValueError(f"named_parameters has the name {repeated[0]!r} more than once, but names must be unique")
        self._max_elements = max_elements
        self._seed = seed
        self._blocks = list(_make_blocks(named, max_elements, seed))
        self._by_param = {watched.param: watched for block in self._blocks for watched in block.members}

    @torch.no_grad()
    def observe(self, *, grad_scale: Tensor | None = None) -> None:
        """Update the estimates by the gradients in `param.grad`. Call it once for each step, after `backward()`.

        Args:
            grad_scale: a 0-d factor to divide the gradients by, such as that of a `GradScaler` that has not unscaled them.
        """
        for block in self._blocks:
            first = start = 0
            for step, run in itertools.groupby(block.members, lambda each: -1 if each.param.grad is None else each.step):
                last = first + len(list(run))
                end = start + sum(each.size for each in block.members[first:last])
                if step >= 0:
                    self._observe_run(block, first, last, State(*(array[start:end] for array in block.state)), grad_scale)
                first, start = last, end

    def _observe_run(self, block: Block, first: int, last: int, state: State, grad_scale: Tensor | None) -> None:
        """Update the state of consecutive members with one count of steps."""
        members = block.members[first:last]
        grads = [each.gather(grad_scale) for each in members]
        grad = grads[0] if len(grads) == 1 else torch.cat(grads)
        if members[0].step:
            if (first, last) not in block.sizes:
                # Kept, because a copy to the device waits for it.
                block.sizes[first, last] = torch.tensor([each.size for each in members], device=grad.device)

            def sum_each(values: Tensor) -> Tensor:
                if len(members) == 1:  # takes a tenth of the time
                    return values.sum()[None]
                return torch.segment_reduce(values, "sum", lengths=block.sizes[first, last])

            squares, variances = observer.sum_innovations(grad, state, sum_each)
            for each, *sums in zip(members, squares.unbind(), variances.unbind(), strict=True):
                each.innovations = Innovations(*sums)
        coefficients = observer.compute_coefficients(members[0].step + 1, self._hyper)
        for old, new in zip(state, _update(grad, state, coefficients), strict=True):
            old.copy_(new)
        for each in members:
            each.step += 1

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Observe the gradients before each step of an optimizer.

        With a closure, these are the gradients before the closure computes new ones. A step in a CUDA graph calls no hooks.

        Args:
            optimizer: any torch optimizer; a `GradScaler` may call it.

        Returns:
            A handle: `remove()` ends observing, and so does the end of a `with` block.
        """

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def observe(optimizer: Any, args: Any, kwargs: Any) -> None:
            # A scaler leaves it to a fused optimizer to unscale its gradients.
            self.observe(grad_scale=getattr(optimizer, "grad_scale", None))

        return optimizer.register_step_pre_hook(observe)

    def posterior(self, param: Tensor) -> Posterior:
        """Return the posterior of a parameter's gradient: the uncertainty of the gradient, not of the weights.

        Args:
            param: a watched parameter with at least one observed gradient.

        Returns:
            Copies on the parameter's device, float64 for float64 parameters, else float32. They have the shape of the
            parameter (of its local shard) if all its elements are watched, with a last axis of 2 for complex numbers; else they
            are 1-D, in the order of `elements(param)`.

        Raises:
            ValueError: the parameter is not watched, or no gradient was observed.
        """
        watched = self._get_watched(param)
        if not watched.step:
            raise ValueError(f"param is {watched.name}, which has no gradient yet, but one must be observed first")
        posterior = observer.compute_posterior(watched.state)
        # A copy, because the next step overwrites the state.
        posterior = posterior._replace(mean=posterior.mean.clone(), gain=posterior.gain.clone())
        if watched.elements is not None:
            return posterior
        local = _get_local(param)
        shape = (*local.shape, 2) if local.is_complex() else local.shape
        return Posterior(*(field.reshape(shape) for field in posterior))

    def elements(self, param: Tensor) -> Tensor | None:
        """Return the indices of a parameter's watched elements.

        Args:
            param: a watched parameter.

        Returns:
            Ascending indices into the flattened parameter (its local shard; real and imaginary parts alternate), or None if all
            elements are watched.

        Raises:
            ValueError: the parameter is not watched.
        """
        return self._get_watched(param).elements

    def surprise(self) -> dict[str, Tensor]:
        """Return how unexpected the last observed gradients were.

        With sharded parameters all processes must call this method, because it sums over them.

        Returns:
            A 0-d tensor by name, for each parameter with at least two observed gradients: the last gradient's squared
            innovations over their expected variances, both summed over the watched elements. It is near 1 where the model
            fits and large at a spike.
        """
        found = {each.name: each.innovations for each in self._by_param.values() if each.innovations is not None}
        sharded = [each.name for each in self._by_param.values() if each.name in found and _is_sharded(each.param)]
        if sharded:
            table = torch.stack([torch.stack(found[name]) for name in sharded])
            # Replicas count several times in both sums, and drop out of the quotient.
            torch.distributed.all_reduce(table)
            found.update((name, Innovations(*row.unbind())) for name, row in zip(sharded, table, strict=True))
        return {name: innovations.surprise for name, innovations in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parameters by name, and the options; of sharded parameters this process's shards."""
        return {
            "options": {"max_elements": self._max_elements, "seed": self._seed, **self._hyper._asdict()},
            "state": {
                each.name: {"step": each.step, **{name: array.clone() for name, array in each.state._asdict().items()}}
                for each in self._by_param.values()
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the state of all parameters.

        Args:
            state_dict: what `state_dict()` of an observer with the same parameters, `max_elements` and `seed` returned.

        Raises:
            ValueError: it has other parameters, shapes, `max_elements` or `seed`; nothing has changed then.
        """
        options, states = state_dict["options"], state_dict["state"]
        for name, ours in (("max_elements", self._max_elements), ("seed", self._seed)):
            if options[name] != ours:
                raise ValueError(f"state_dict has {name} {options[name]}, but must have the observer's {ours}")
        by_name = {each.name: each for each in self._by_param.values()}
        if missing := sorted(set(by_name) ^ set(states)):
            raise ValueError(f"state_dict and observer do not both have {missing[0]}, but must have the same parameters")
        for name, each in by_name.items():
            for field, array in each.state._asdict().items():
                if states[name][field].shape != array.shape:
                    found = tuple(states[name][field].shape)
                    raise ValueError(f"state_dict has {field} of shape {found} for {name}, but must have {tuple(array.shape)}")
        for name, each in by_name.items():
            each.step = int(states[name]["step"])
            for field, array in each.state._asdict().items():
                array.copy_(states[name][field])

    def list_blocks(self) -> list[Block]:
        """Return what is stored, in the order of `named_parameters`."""
        return self._blocks

    def _get_watched(self, param: Tensor) -> Watched:
        if param not in self._by_param:
            raise ValueError(f"param of shape {tuple(param.shape)} is not watched, but must be one of named_parameters")
        return self._by_param[param]


def _check_pair(pair: Any) -> tuple[str, Tensor]:
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)):
        raise TypeError(f"named_parameters has a {type(pair).__name__}, but must have pairs of a name and a tensor")
    name, param = pair
    if not (param.is_floating_point() or param.is_complex()):
        raise ValueError(f"named_parameters has {name} of {param.dtype}, but must have floating or complex numbers")
    return name, param


def _make_blocks(named: Sequence[tuple[str, Tensor]], max_elements: int | None, seed: int) -> Iterator[Block]:
    """Yield blocks of consecutive parameters of one device and dtype."""
    members: list[tuple[str, Tensor, Any, int]] = []
    key: Any = None
    total = 0
    for index, (name, param) in enumerate(named):
        numbers = _get_numbers(param)
        elements = observer.choose_elements(numbers.numel(), max_elements, seed, index)
        size = numbers.numel() if elements is None else len(elements)
        new_key = numbers.device, torch.promote_types(numbers.dtype, torch.float32)
        largest = _CPU_BLOCK if numbers.device.type == "cpu" else _ACCELERATOR_BLOCK
        if members and (new_key != key or total + size > largest):
            yield _make_block(members, *key)
            members, total = [], 0
        members.append((name, param, elements, numbers.numel()))
        key, total = new_key, total + size
    if members:
        yield _make_block(members, *key)


def _make_block(members: Sequence[tuple[str, Tensor, Any, int]], device: Any, dtype: Any) -> Block:
    sizes = [numbers if elements is None else len(elements) for *_, elements, numbers in members]
    state = State(*(torch.full((sum(sizes),), value, dtype=dtype, device=device) for value in observer.INITIAL_STATE))
    parts = zip(*(array.split(sizes) for array in state), strict=True)
    watched = []
    for (name, param, elements, numbers), part in zip(members, parts, strict=True):
        chosen = None if elements is None else torch.from_numpy(elements).to(device)
        watched.append(Watched(name, param, chosen, numbers, State(*part)))
    return Block(watched, state, {})


def _is_sharded(param: Any) -> bool:
    return hasattr(param, "to_local")


def _get_local(tensor: Any) -> Tensor:
    """Return this process's shard of a tensor, or the whole tensor."""
    local: Tensor = tensor.to_local() if _is_sharded(tensor) else tensor
    return local


def _get_numbers(tensor: Any) -> Tensor:
    """Return the real numbers of this process's shard as a vector."""
    local = _get_local(tensor.detach())
    return (torch.view_as_real(local.resolve_conj()) if local.is_complex() else local).reshape(-1)
