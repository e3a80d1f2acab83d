"""The protocol of our comparison: who takes part, what is tried for each, what is chosen, and on which seeds it is told."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from experiments import optimizers, tasks
from experiments.names import look_up

#: What is chosen is chosen on these seeds, by the validation metric at the end.
TUNING_SEEDS = (0, 1, 2)
#: What is told is told of these, whose weights and batches had no say.
TEST_SEEDS = tuple(range(100, 110))

#: The part of tuned AdamW's way that counts as arriving.
TARGET_PART = 0.98

#: Factors on the learning rate by the part of the run that is over.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda part: 1.0,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
}


@dataclass(frozen=True)
class Entrant:
    """An optimizer as it takes part.

    Attributes:
        title: what tables and plots call it.
        optimizer: its name among `optimizers.OPTIMIZERS`.
        hyper: what it is given beside the learning rate.
        warm_up: the part of the run in which the learning rate rises in proportion to the steps.
    """

    title: str
    optimizer: str
    hyper: Mapping[str, float] = field(default_factory=dict)
    warm_up: float = 0.0

    @property
    def base(self) -> optimizers.Optimizer:
        """The optimizer."""
        return optimizers.find_optimizer(self.optimizer)

    def make(self) -> Any:
        """A new Keras optimizer."""
        return self.base.make(**self.hyper)


ENTRANTS: dict[str, Entrant] = {
    "vsgd": Entrant("VSGD", "vsgd"),
    "vsgd-kappas": Entrant("VSGD, kappas 0.6 and 0.7", "vsgd", {"kappa1": 0.6, "kappa2": 0.7}),
    "constant-vsgd": Entrant("Constant VSGD", "constant-vsgd"),
    "adamw": Entrant("AdamW", "adamw"),
    # VSGD's first sigma2 works as a warm-up, so that a fair Adam has one.
    "adamw-warm": Entrant("AdamW, warm-up, beta2 0.99", "adamw", {"beta_2": 0.99}, warm_up=0.05),
    "sgd": Entrant("SGD with momentum", "sgd"),
    "lion": Entrant("Lion", "lion"),
}
#: Whom targets and differences refer to.
BASELINE = "adamw"


@functools.cache
def find_entrant(name: str) -> Entrant:
    """The entrant of this name; NAME:kappa1=0.6,kappa2=0.7 is one with these hyperparameters.

    Args:
        name: a key of `ENTRANTS`, or one with ":" and hyperparameters, separated by commas.

    Raises:
        ValueError: there is none, or no number follows a hyperparameter.
    """
    base, colon, given = name.partition(":")
    found = look_up("entrant", base, ENTRANTS)
    if not colon:
        return found
    try:
        hyper = {each: float(value) for each, value in (pair.split("=") for pair in given.split(","))}
    except ValueError:
        raise ValueError(f"entrant is {name!r}, but after : must come NAME=NUMBER, separated by commas") from None
    told = ", ".join(f"{each} {value:g}" for each, value in hyper.items())
    return dataclasses.replace(found, title=f"{found.title}, {told}", hyper={**found.hyper, **hyper})


def format_overview() -> str:
    """What `python -m experiments list` prints of our tasks."""
    lines = [f"{name:24} {each.steps} steps" for name, each in tasks.TASKS.items()]
    return "\n".join([*lines, *(f"  --entrants {name:14} {each.title}" for name, each in ENTRANTS.items())])


class Trial(NamedTuple):
    """What tuning chooses.

    Attributes:
        learning_rate: the highest of the run.
        schedule: its name among `SCHEDULES`.
    """

    learning_rate: float
    schedule: str


def _list_default_trial(entrant: Entrant) -> list[Trial]:
    return [Trial(entrant.base.learning_rate, "constant")]


def _list_five_trials(entrant: Entrant) -> list[Trial]:
    # Every other of the ten; these are nearer to the defaults than the rest.
    return [Trial(rate, "cosine") for rate in entrant.base.list_learning_rates(10)[1::2]]


def _list_twenty_trials(entrant: Entrant) -> list[Trial]:
    return [Trial(rate, schedule) for schedule in SCHEDULES for rate in entrant.base.list_learning_rates(10)]


#: What may be chosen from, by the name of the arm. The five are among the twenty.
ARMS: dict[str, Callable[[Entrant], list[Trial]]] = {
    "defaults": _list_default_trial,
    "5 trials": _list_five_trials,
    "20 trials": _list_twenty_trials,
}
#: The arm whose trials are all that are made, and that the target comes from.
WIDEST = "20 trials"


class Setting(NamedTuple):
    """A run.

    Attributes:
        task: the name of what is trained.
        entrant: the name of whom.
        trial: with what.
        seed: from which weights on which batches.
        backend: of Keras.
    """

    task: str
    entrant: str
    trial: Trial
    seed: int
    backend: str

    @property
    def key(self) -> dict[str, Any]:
        """What tells the run's record from others."""
        task, who = tasks.find_task(self.task), find_entrant(self.entrant)
        told = {"task": task.name, "edition": task.compute_edition(), "steps": task.steps, "optimizer": who.optimizer}
        hyper = {"hyper": dict(who.hyper)} if who.hyper else {}
        warm_up = {"warm_up": who.warm_up} if who.warm_up else {}
        return {**told, **hyper, **warm_up, **self.trial._asdict(), "seed": self.seed, "backend": self.backend}

    @property
    def rates(self) -> list[float]:
        """The learning rate of each step."""
        steps, (rate, schedule) = tasks.find_task(self.task).steps, self.trial
        warm = find_entrant(self.entrant).warm_up * steps
        shape = SCHEDULES[schedule]
        return [rate * shape(step / steps) * (min(1.0, (step + 1) / warm) if warm else 1.0) for step in range(steps)]


class Comparison:
    """The protocol on one task, as far as there are records.

    Args:
        task: the problem.
        find: the record of a run, or None where it is not finished.
        backend: of Keras.
        entrants: who takes part, by name.
    """

    def __init__(
        self,
        task: tasks.Task,
        find: Callable[[Setting], Mapping[str, Any] | None],
        backend: str = "jax",
        entrants: Sequence[str] = tuple(ENTRANTS),
    ) -> None:
        self.task = task
        self.backend = backend
        self.entrants = entrants
        self._find = find

    def _make_setting(self, entrant: str, trial: Trial, seed: int) -> Setting:
        return Setting(self.task.name, entrant, trial, seed, self.backend)

    def list_tuning_settings(self, entrant: str) -> Iterator[Setting]:
        """The runs that tuning needs.

        Args:
            entrant: by name.
        """
        for trial in ARMS[WIDEST](find_entrant(entrant)):
            yield from (self._make_setting(entrant, trial, seed) for seed in TUNING_SEEDS)

    def list_test_settings(self, entrant: str) -> Iterator[Setting]:
        """The runs that are told of, in arms whose trials are all made; what two arms chose comes once.

        Args:
            entrant: by name.
        """
        chosen = dict.fromkeys(self.choose_trial(entrant, arm) for arm in ARMS)
        for trial in filter(None, chosen):
            yield from (self._make_setting(entrant, trial, seed) for seed in TEST_SEEDS)

    def score_trial(self, entrant: str, trial: Trial) -> tuple[float, float] | None:
        """The means over the tuning seeds of the metric, with the sign that makes it to be low, and of the loss.

        Infinite where a run diverged; None where a run is not finished.

        Args:
            entrant: by name.
            trial: which.
        """
        found = [self._find(self._make_setting(entrant, trial, seed)) for seed in TUNING_SEEDS]
        if any(each is None for each in found):
            return None
        final = [each["final"] for each in found if each is not None]
        if any(each is None for each in final):
            return math.inf, math.inf
        scores = [each["validation"] for each in final]
        metric = statistics.fmean(each[self.task.metric] for each in scores)
        return self.task.sign * metric, statistics.fmean(each["loss"] for each in scores)

    def choose_trial(self, entrant: str, arm: str) -> Trial | None:
        """The trial with the best mean validation metric, of equal ones with the lower loss; None: some are not made.

        Args:
            entrant: by name.
            arm: by name.
        """
        trials = ARMS[arm](find_entrant(entrant))
        if len(trials) == 1:
            return trials[0]
        scores = [(self.score_trial(entrant, trial), trial) for trial in trials]
        if any(score is None for score, _ in scores):
            return None
        return min(((score, trial) for score, trial in scores if score is not None), key=lambda each: each[0])[1]

    def is_at_edge(self, entrant: str, trial: Trial) -> bool:
        """Whether a trial has the lowest or the highest learning rate of those that are tried.

        Args:
            entrant: by name.
            trial: which.
        """
        rates = [each.learning_rate for each in ARMS[WIDEST](find_entrant(entrant))]
        return trial.learning_rate in (min(rates), max(rates))

    def compute_target(self) -> float | None:
        """What tuned AdamW has come to after 98% of the way from its first validation metric to its last.

        Medians over its tuning runs, so that no test run has a say; None while it is not tuned.
        """
        trial = self.choose_trial(BASELINE, WIDEST)
        if trial is None:
            return None
        curves = [self._find(self._make_setting(BASELINE, trial, seed)) for seed in TUNING_SEEDS]
        first, last = (statistics.median(each["curve"][place] for each in curves if each is not None) for place in (0, -1))
        return first + TARGET_PART * (last - first)

    def find_results(self, entrant: str, trial: Trial) -> list[Mapping[str, Any]] | None:
        """The records of the test seeds, in their order; None where one is missing.

        Args:
            entrant: by name.
            trial: which.
        """
        found = [self._find(self._make_setting(entrant, trial, seed)) for seed in TEST_SEEDS]
        complete = [each for each in found if each is not None]
        return complete if len(complete) == len(found) else None

    def list_tried(self, entrant: str) -> tuple[list[float], list[float]] | None:
        """Learning rates, and the mean validation metric of each with the schedule that was chosen, to be low.

        None while it is not tuned.

        Args:
            entrant: by name.
        """
        best = self.choose_trial(entrant, WIDEST)
        if best is None:
            return None
        trials = [each for each in ARMS[WIDEST](find_entrant(entrant)) if each.schedule == best.schedule]
        scores = [self.score_trial(entrant, each) for each in trials]
        return [each.learning_rate for each in trials], [score[0] for score in scores if score is not None]
