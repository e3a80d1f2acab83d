"""Compare guards against gradient spikes: clipping by the norm, AdaGC, ZClip, and limits on the observer's surprise.

Trains two networks by AdamW with injected faults. Writes `guards.txt` and `guards_compared.txt` for `docs/uncertainty.md`; with
`--screen` it prints what the limit was chosen from, on other seeds:

    pip install '.[examples]'
    python -m experiments.uncertainty.guards
    python -m experiments.uncertainty.guards --screen
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from experiments.uncertainty.noise_scale_training import compute_loss
from experiments.uncertainty.observer import NETWORKS, Network
from reporting.pages import format_table
from vsgd import observer
from vsgd.observer import Hyperparameters, State

OUTPUT = Path("docs/uncertainty")
#: Each network, with the numbers of examples of a look at the loss and of the final one.
NAMES = {"MNIST-1D, CNN": (500, 4000), "characters, transformer": (50, 500)}
LR = 0.003
SEEDS = 10
SCREENED_SEEDS = (100, 101)


class Plan(NamedTuple):
    """When what happens in a run.

    Attributes:
        acts: the guards that need a warm-up act after this step.
        fault: the step of the first fault.
        falls: the step after which the learning rate falls linearly to zero.
        steps: of the run.
        every: the number of steps between two looks at the loss.
    """

    acts: int = 100
    fault: int = 301
    falls: int = 400
    steps: int = 480
    every: int = 10


PLAN = Plan()

# Guards


class Guard(Protocol):
    """Change the gradients of a step, or skip it."""

    def __call__(self) -> float | None:
        """Return the least factor that a gradient was multiplied by; None to skip the step."""


def compute_norm(params: Sequence[Tensor]) -> float:
    """Compute the norm of all gradients together."""
    return torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None]).item()


def scale_gradients(params: Sequence[Tensor], factor: float) -> None:
    """Multiply all gradients."""
    if factor < 1:
        torch._foreach_mul_([param.grad for param in params if param.grad is not None], factor)


class NoGuard:
    """Change nothing."""

    def __call__(self) -> float | None:
        """Return 1."""
        return 1.0


class NormClipping:
    """Clip the norm of all gradients together at a constant."""

    def __init__(self, params: Sequence[Tensor], limit: float) -> None:
        self.params, self.limit = params, limit

    def __call__(self) -> float | None:
        """Clip."""
        norm = compute_norm(self.params)
        if not math.isfinite(norm):
            return None
        factor = min(1.0, self.limit / norm)
        scale_gradients(self.params, factor)
        return factor


class AdaGC:
    """Clip each tensor's norm at a multiple of a running mean of its clipped norms (arXiv 2502.11034), at its defaults."""

    def __init__(self, params: Sequence[Tensor], plan: Plan, multiple: float = 1.05, beta: float = 0.98) -> None:
        self.params, self.warm_up, self.multiple, self.beta = params, plan.acts, multiple, beta
        self.first = NormClipping(params, 1.0)
        self.step, self.means = 0, torch.full((len(params),), math.inf)

    def __call__(self) -> float | None:
        """Clip all gradients together in the warm-up, then each on its own."""
        grads = [param.grad for param in self.params if param.grad is not None]
        if self.step < self.warm_up:
            factor = self.first()
            norms = torch.stack(torch._foreach_norm(grads))
            if factor is not None:
                self.means = torch.minimum(self.means, norms)
        else:
            norms = torch.stack(torch._foreach_norm(grads))
            if not norms.isfinite().all():
                return None
            factors = (self.multiple * self.means / norms.clamp(min=1e-30)).clamp(max=1.0)
            torch._foreach_mul_(grads, list(factors.unbind()))
            self.means = self.beta * self.means + (1 - self.beta) * factors * norms
            factor = factors.min().item()
        self.step += 1
        return factor


class ZClip:
    """Clip the norm by its z-score among recent ones (arXiv 2504.02507), with its reciprocal rule and its defaults."""

    def __init__(self, params: Sequence[Tensor], limit: float = 2.5, alpha: float = 0.97, warm_up: int = 25) -> None:
        self.params, self.limit, self.alpha, self.warm_up = params, limit, alpha, warm_up
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def __call__(self) -> float | None:
        """Clip a norm of a z-score beyond the limit to that of the squared limit over the z-score."""
        norm = compute_norm(self.params)
        if not math.isfinite(norm):
            return None
        if len(self.first) < self.warm_up:
            self.first.append(norm)
            self.mean, self.variance = float(np.mean(self.first)), float(np.var(self.first))
            return 1.0
        deviation = math.sqrt(self.variance) + 1e-6
        score = (norm - self.mean) / deviation
        clipped = self.mean + self.limit**2 / score * deviation if score > self.limit else norm
        scale_gradients(self.params, clipped / norm)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * clipped
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (clipped - self.mean) ** 2
        return clipped / norm


class ObserverGuard:
    """Scale each tensor's gradient to a limit on its surprise, or skip the step; the observer sees what the optimizer sees.

    A tensor's surprise is the mean squared standardized innovation, or, pooled, the sum of squared innovations over the sum of
    their variances. More than `patience` surprising steps in a row are believed.

    Args:
        params: the parameters, all with gradients at each step.
        plan: when it acts.
        limit: of the surprise.
        skips: whether to skip the step.
        pooled: whether the surprise is pooled.
        patience: steps in a row that are not believed.
    """

    def __init__(
        self, params: Sequence[Tensor], plan: Plan, limit: float, skips: bool, pooled: bool = True, patience: int = 5
    ) -> None:
        self.params, self.acts, self.limit, self.skips, self.pooled = params, plan.acts, limit, skips, pooled
        self.patience = patience
        self.update = observer.make_update(OPS)
        self.sizes = torch.tensor([param.numel() for param in params])
        self.state = State(*(torch.full((int(self.sizes.sum()),), value) for value in observer.INITIAL_STATE))
        self.step = 0
        self.streaks = torch.zeros(len(params), dtype=torch.int64)
        self.surprise = torch.ones(len(params))

    def __call__(self) -> float | None:
        """Scale or skip, and observe."""
        grad = torch.cat([param.grad.ravel() for param in self.params if param.grad is not None])
        if not grad.isfinite().all():
            return None
        factor = 1.0
        if self.step > 0:
            self.surprise = self.compute_surprise(grad)
        if self.step >= self.acts:
            beyond = self.surprise > self.limit
            self.streaks = torch.where(beyond, self.streaks + 1, 0)
            doubted = beyond & (self.streaks <= self.patience)
            if doubted.any():
                if self.skips:
                    return None
                factors = torch.where(doubted, (self.limit / self.surprise).sqrt(), 1.0)
                torch._foreach_mul_([param.grad for param in self.params if param.grad is not None], list(factors.unbind()))
                grad = grad * factors.repeat_interleave(self.sizes)
                factor = factors.min().item()
        self.step += 1
        self.state = self.update(OPS.asarray(grad), self.state, observer.compute_coefficients(self.step, Hyperparameters()))
        return factor

    def compute_surprise(self, grad: Tensor) -> Tensor:
        """Return the surprise of each tensor."""
        total = partial(torch.segment_reduce, reduce="sum", lengths=self.sizes)
        if self.pooled:
            return observer.sum_innovations(grad, self.state, total).surprise
        innovation, variance = grad - self.state.mean, self.state.innovation_variance
        # An element without a gradient so far, as of a character that did not occur, predicts nothing.
        predicts = variance > 0
        ratios = torch.where(predicts, innovation.square() / torch.where(predicts, variance, 1.0), 0.0)
        return total(ratios) / total(predicts.float()).clamp(min=1.0)


OPS: Any = torch
#: The limit of the observer's guards: see `--screen`.
LIMIT = 16.0
#: The norm at which clipping cuts, over the median norm of a run without faults.
CLIP_FACTOR = 2.0
MakeGuard = Callable[[Sequence[Tensor], Plan, float], Guard]
NO_GUARD, ZCLIP = "none", "ZClip"
OBSERVERS = ("observer, scales", "observer, skips")


def make_no_guard(params: Sequence[Tensor], plan: Plan, norm: float) -> Guard:
    """Make the guard that changes nothing."""
    return NoGuard()


def make_norm_clipping(params: Sequence[Tensor], plan: Plan, norm: float) -> Guard:
    """Make norm clipping at a multiple of a norm."""
    return NormClipping(params, CLIP_FACTOR * norm)


def make_adagc(params: Sequence[Tensor], plan: Plan, norm: float) -> Guard:
    """Make AdaGC."""
    return AdaGC(params, plan)


def make_zclip(params: Sequence[Tensor], plan: Plan, norm: float) -> Guard:
    """Make ZClip."""
    return ZClip(params)


def make_observer_guard(
    params: Sequence[Tensor], plan: Plan, norm: float, *, limit: float = LIMIT, skips: bool = False, pooled: bool = True
) -> Guard:
    """Make an observer's guard."""
    return ObserverGuard(params, plan, limit, skips, pooled)


make_skipping_guard = partial(make_observer_guard, skips=True)
GUARDS: dict[str, MakeGuard] = {
    NO_GUARD: make_no_guard,
    "norm clipping": make_norm_clipping,
    "AdaGC": make_adagc,
    ZCLIP: make_zclip,
    OBSERVERS[0]: make_observer_guard,
    OBSERVERS[1]: make_skipping_guard,
}
CANDIDATES: dict[str, MakeGuard] = {
    NO_GUARD: make_no_guard,
    ZCLIP: make_zclip,
    "scales beyond 8": partial(make_observer_guard, limit=8.0),
    "scales beyond 16": partial(make_observer_guard, limit=16.0),
    "skips beyond 8": partial(make_skipping_guard, limit=8.0),
    "skips beyond 16": partial(make_skipping_guard, limit=16.0),
    "scales beyond 16, not pooled": partial(make_observer_guard, limit=16.0, pooled=False),
}

# Faults


class Fault(NamedTuple):
    """What goes wrong in a run.

    Attributes:
        every: the number of steps from one fault to the next; 0: there is one alone.
        mislabels: whether the batch's targets are permuted.
        spoil: changes the gradients.
    """

    every: int = 0
    mislabels: bool = False
    spoil: Callable[[Sequence[Tensor], torch.Generator], None] = lambda grads, generator: None

    def occurs(self, step: int, first: int) -> bool:
        """Return whether there is a fault at a step."""
        return step == first or (step > first and self.every > 0 and (step - first) % self.every == 0)


def multiply(grads: Sequence[Tensor], generator: torch.Generator, factor: float) -> None:
    """Multiply all gradients."""
    for grad in grads:
        grad.mul_(factor)


def replace_quarter(grads: Sequence[Tensor], generator: torch.Generator) -> None:
    """Replace a quarter, one rank's of four, by normal noise of ten times the norm of all."""
    noise = [torch.randn(grad.shape, generator=generator) for grad in grads]
    ratio = 10 * torch.nn.utils.get_total_norm(grads) / torch.nn.utils.get_total_norm(noise)
    for grad, each in zip(grads, noise, strict=True):
        grad.mul_(0.75).add_(0.25 * ratio * each)


def overflow(grads: Sequence[Tensor], generator: torch.Generator) -> None:
    """Set a hundredth of one matrix to the largest numbers of fp16."""
    matrices = [grad for grad in grads if grad.ndim > 1]
    chosen = matrices[int(torch.randint(len(matrices), (), generator=generator))].view(-1)
    places = torch.randperm(len(chosen), generator=generator)[: math.ceil(len(chosen) / 100)]
    chosen[places] = 65504.0 * torch.randn(len(places), generator=generator).sign()


NO_FAULT = "no fault"
FAULTS = {
    NO_FAULT: Fault(),
    "one batch x 100": Fault(spoil=partial(multiply, factor=100.0)),
    "one batch x 10,000": Fault(spoil=partial(multiply, factor=1e4)),
    "1% of batches mislabelled": Fault(every=100, mislabels=True),
    "a bad rank": Fault(every=50, spoil=replace_quarter),
    "overflow in fp16": Fault(spoil=overflow),
}

# Runs


class Training(NamedTuple):
    """What changes in a run.

    Attributes:
        model: the network.
        optimizer: of its parameters.
        guard: of their gradients.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    guard: Guard


class Outcome(NamedTuple):
    """Measurements of a run.

    Attributes:
        loss: at the end, on the first examples, over that of the twin, the run without fault and guard.
        behind: the number of steps from the first fault on whose loss, averaged over three looks, is 2% above the twin's.
        touched: the share of the steps without fault, after the warm-up, whose gradient was changed.
        caught: the share of the steps with a fault whose gradient was changed; NaN if there are none.
    """

    loss: float
    behind: float
    touched: float
    caught: float


def make_network(name: str, seed: int) -> Network:
    """Make a network with initial weights of a seed."""
    torch.manual_seed(seed)
    return NETWORKS[name]()


def draw_batches(network: Network, steps: int) -> list[Tensor]:
    """Return the indices of the batches of a run."""
    epochs = itertools.chain.from_iterable(network.draw_epoch() for _ in itertools.count())
    return list(itertools.islice(epochs, steps))


def advance(
    training: Training, network: Network, batches: Sequence[Tensor], steps: range, fault: Fault, plan: Plan
) -> Iterator[tuple[bool, float | None]]:
    """Take steps; yield for each whether it had a fault, and what the guard returned."""
    params = list(training.model.parameters())
    for step in steps:
        batch = batches[step - 1]
        generator = torch.Generator().manual_seed(1000 * step + int(batch[0]))
        faulty = fault.occurs(step, plan.fault) and fault is not FAULTS[NO_FAULT]
        y = network.y[batch]
        if faulty and fault.mislabels:
            y = y.view(-1)[torch.randperm(y.numel(), generator=generator)].view(y.shape)
        training.optimizer.zero_grad()
        compute_loss(training.model, network.x[batch], y).backward()
        if faulty:
            fault.spoil([param.grad for param in params if param.grad is not None], generator)
        training.optimizer.param_groups[0]["lr"] = LR * min(1.0, (plan.steps - step + 1) / (plan.steps - plan.falls))
        with torch.no_grad():
            factor = training.guard()
        if factor is not None:
            training.optimizer.step()
        yield faulty, factor


@torch.no_grad()
def evaluate(model: nn.Module, network: Network, count: int) -> float:
    """Compute the loss on the first examples."""
    return compute_loss(model, network.x[:count], network.y[:count]).item()


def follow(
    name: str, seed: int, norm: float, plan: Plan = PLAN, guards: Mapping[str, MakeGuard] = GUARDS
) -> dict[tuple[str, str], Outcome]:
    """Train with each fault and each guard, from the same weights and on the same batches.

    Args:
        name: of the network.
        seed: of weights and batches.
        norm: the median norm of a run without faults.
        plan: of the runs.
        guards: by name; the first changes nothing.

    Returns:
        The outcomes by fault and guard.
    """
    torch.set_num_threads(1)  # small networks gain nothing from a second one
    network = make_network(name, seed)
    batches = draw_batches(network, plan.steps)
    looked, last = NAMES[name]
    outcomes: dict[tuple[str, str], Outcome] = {}
    twin: tuple[float, list[float]] | None = None
    for guard_name, make_guard in guards.items():
        model = copy.deepcopy(network.model)
        params = list(model.parameters())
        start = Training(model, torch.optim.AdamW(params, lr=LR, fused=True), make_guard(params, plan, norm))
        # All faults share the steps before the first.
        before = list(advance(start, network, batches, range(1, plan.fault), FAULTS[NO_FAULT], plan))[plan.acts :]
        for fault_name, fault in FAULTS.items():
            training = copy.deepcopy(start)
            taken, looks = list(before), []
            for step in range(plan.fault, plan.steps + 1):
                taken += advance(training, network, batches, range(step, step + 1), fault, plan)
                if (step - plan.fault) % plan.every == 0:
                    looks.append(evaluate(training.model, network, looked))
            smooth = [fmean(looks[max(0, end - 3) : end]) for end in range(1, len(looks) + 1)]
            loss = evaluate(training.model, network, last)
            twin = twin or (loss, smooth)
            behind = plan.every * sum(not ours <= 1.02 * theirs for ours, theirs in zip(smooth, twin[1], strict=True))
            shares = []
            for kind in (False, True):
                changed = [factor is None or factor < 1 for faulty, factor in taken if faulty == kind]
                shares.append(fmean(changed) if changed else math.nan)
            outcomes[fault_name, guard_name] = Outcome(loss / twin[0], behind, *shares)
    return outcomes


class Surprises(NamedTuple):
    """What a run without faults looks like.

    Attributes:
        norm: the median norm of the gradient.
        mean: the surprise of each tensor at each step after the warm-up.
        pooled: likewise, pooled.
    """

    norm: float
    mean: Tensor
    pooled: Tensor


def look_at_surprises(name: str, seed: int, plan: Plan = PLAN) -> Surprises:
    """Train without faults and without guard, and watch."""
    torch.set_num_threads(1)
    network = make_network(name, seed)
    batches = draw_batches(network, plan.steps)
    params = list(network.model.parameters())
    watching = [ObserverGuard(params, plan, math.inf, skips=False, pooled=pooled) for pooled in (False, True)]
    training = Training(network.model, torch.optim.AdamW(params, lr=LR, fused=True), NoGuard())
    norms, surprises = [], []
    for step in range(1, plan.steps + 1):
        list(advance(training, network, batches, range(step, step + 1), FAULTS[NO_FAULT], plan))
        # The gradients are those of the step.
        with torch.no_grad():
            for each in watching:
                each()
        if step > plan.acts:
            norms.append(compute_norm(params))
            surprises.append(torch.stack([each.surprise for each in watching]))
    mean, pooled = torch.stack(surprises, dim=1)
    return Surprises(float(np.median(norms)), mean, pooled)


# Tables


def compute_interval(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean and the half-width of its 95% interval, by Student's distribution."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) * float(stats.t.ppf(0.975, len(values) - 1))


def format_ratio(interval: tuple[float, float], digits: int) -> str:
    """Format the ratio of a mean logarithm, with its interval."""
    mean, half = interval
    return f"{math.exp(mean):.{digits}f} ({math.exp(mean - half):.{digits}f} to {math.exp(mean + half):.{digits}f})"


Outcomes = Mapping[str, Sequence[Mapping[tuple[str, str], Outcome]]]


def format_outcomes(found: Outcomes) -> str:
    """Format a Markdown table with a row for each network, fault and guard.

    Args:
        found: by network, the outcomes of each seed.
    """
    rows = []
    for name, seeds in found.items():
        for fault, guard in sorted(seeds[0], key=lambda key: list(FAULTS).index(key[0])):
            outcomes = [seed[fault, guard] for seed in seeds]
            loss = compute_interval([math.log(each.loss) for each in outcomes])
            behind, behind_half = compute_interval([each.behind for each in outcomes])
            caught = fmean(each.caught for each in outcomes)
            touched = fmean(each.touched for each in outcomes)
            shares = ["" if math.isnan(caught) else f"{100 * caught:.0f}", f"{100 * touched:.1f}"]
            rows.append([name, fault, guard, format_ratio(loss, 3), f"{behind:.0f} ± {behind_half:.0f}", *shares])
    heads = ["loss / twin", "steps behind twin", "faults touched, %", "other steps touched, %"]
    return format_table(["network", "fault", "guard", *heads], rows, left=3) + "\n"


def format_comparison(found: Outcomes) -> str:
    """Format a Markdown table of the observer's guards against ZClip, by paired differences over the seeds."""
    rows = []
    every = [fault for fault in FAULTS if fault != NO_FAULT]
    for name, seeds in found.items():
        for guard in OBSERVERS:
            for title, faults in [*((fault, [fault]) for fault in FAULTS), ("mean over the five faults", every)]:
                differences = []
                for seed in seeds:
                    pairs = [(seed[fault, guard], seed[fault, ZCLIP]) for fault in faults]
                    differences.append(
                        (
                            fmean(math.log(ours.loss / theirs.loss) for ours, theirs in pairs),
                            fmean(ours.behind - theirs.behind for ours, theirs in pairs),
                            fmean(ours.touched - theirs.touched for ours, theirs in pairs),
                        )
                    )
                loss, behind, touched = (compute_interval(column) for column in zip(*differences, strict=True))
                points = f"{100 * touched[0]:+.1f} ± {100 * touched[1]:.1f}"
                cells = [format_ratio(loss, 4), f"{behind[0]:+.0f} ± {behind[1]:.0f}", points]
                rows.append([name, guard, title, *cells])
    heads = ["loss / ZClip", "steps behind twin", "other steps touched, points"]
    return format_table(["network", "guard, against ZClip", "fault", *heads], rows, left=3) + "\n"


def format_surprises(found: Mapping[str, Sequence[Surprises]]) -> str:
    """Format a Markdown table of the quantiles of surprises."""
    rows = []
    for name, seeds in found.items():
        for kind in ("mean", "pooled"):
            values = torch.cat([getattr(each, kind) for each in seeds]).double()
            quantiles = np.quantile(values.numpy(), (0.5, 0.99, 0.999, 1))
            # The shares of steps with one tensor or more beyond a limit.
            beyond = [f"{100 * (values.amax(1) > limit).double().mean():.2f}" for limit in (4, 8, 16)]
            rows.append([name, kind, *(f"{each:.3g}" for each in quantiles), *beyond])
    heads = ["median", "99%", "99.9%", "largest", *(f"% of steps beyond {limit}" for limit in (4, 8, 16))]
    return format_table(["network", "surprise", *heads], rows, left=2) + "\n"


def main() -> None:
    """Run the command line: write the tables."""
    parser = argparse.ArgumentParser(description="Compare guards against gradient spikes.")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of seeds, at least 2 (default: %(default)s)")
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=list(NAMES), help="(default: both)")
    parser.add_argument("--screen", action="store_true", help="screen limits on other seeds instead")
    parser.add_argument("--processes", type=int, default=2, help="that train (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    names = arguments.networks
    with ProcessPoolExecutor(arguments.processes) as pool:
        watched = list(itertools.product(names, SCREENED_SEEDS))
        found = list(pool.map(look_at_surprises, *zip(*watched, strict=True)))
        surprises = {name: [each for key, each in zip(watched, found, strict=True) if key[0] == name] for name in names}
        if arguments.screen:
            print(format_surprises(surprises), flush=True)
        keys = list(itertools.product(names, SCREENED_SEEDS if arguments.screen else range(arguments.seeds)))
        train = partial(follow, guards=CANDIDATES if arguments.screen else GUARDS)
        norms = [surprises[name][0].norm for name, _ in keys]
        runs = list(pool.map(train, *zip(*keys, strict=True), norms))
        outcomes = {name: [each for key, each in zip(keys, runs, strict=True) if key[0] == name] for name in names}
    table = format_outcomes(outcomes)
    print(table, end="")
    if not arguments.screen:
        comparison = format_comparison(outcomes)
        print("\n" + comparison, end="")
        (arguments.output / "guards.txt").write_text(table, encoding="utf-8")
        (arguments.output / "guards_compared.txt").write_text(comparison, encoding="utf-8")


if __name__ == "__main__":
    main()
