"""Define the protocol of the comparison: entrants, trials, the choice among trials, and the seeds of the tests."""

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
from vsgd.prior import AUTO

#: Tuning chooses on these seeds, by the validation metric at the end.
TUNING_SEEDS = (0, 1, 2)
#: Tables report these seeds, whose weights and batches tuning never uses.
TEST_SEEDS = tuple(range(100, 110))

#: The target is after this part of the way from tuned AdamW's first validation metric to its last.
TARGET_PART = 0.98

#: Factors on the learning rate, by the finished part of the run.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda part: 1.0,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
}


@dataclass(frozen=True)
class Entrant:
    """An optimizer with its settings in the comparison.

    Attributes:
        title: its name in tables and plots.
        optimizer: a key of `optimizers.OPTIMIZERS`.
        hyper: arguments other than the learning rate.
        warm_up: the part of the run in which the learning rate rises linearly.
    """

    title: str
    optimizer: str
    hyper: Mapping[str, float | str] = field(default_factory=dict)
    warm_up: float = 0.0

    @property
    def base(self) -> optimizers.Optimizer:
        """The optimizer."""
        return optimizers.find_optimizer(self.optimizer)

    def make(self) -> Any:
        """Make a new Keras optimizer."""
        return self.base.make(**self.hyper)


ENTRANTS: dict[str, Entrant] = {
    "vsgd": Entrant("VSGD", "vsgd"),
    "vsgd-kappas": Entrant("VSGD, kappas 0.6 and 0.7", "vsgd", {"kappa1": 0.6, "kappa2": 0.7}),
    "constant-vsgd": Entrant("Constant VSGD", "constant-vsgd"),
    "adamw": Entrant("AdamW", "adamw"),
    # VSGD's initial sigma2 works as a warm-up, so a fair Adam has one.
    "adamw-warm": Entrant("AdamW, warm-up, beta2 0.99", "adamw", {"beta_2": 0.99}, warm_up=0.05),
    "sgd": Entrant("SGD with momentum", "sgd"),
    "lion": Entrant("Lion", "lion"),
}
#: The entrant that targets and differences refer to.
BASELINE = "adamw"


@functools.cache
def find_entrant(name: str) -> Entrant:
    """Return the entrant with a name; NAME:kappa1=0.6,prior_strength=auto has other hyperparameters.

    Args:
        name: a key of `ENTRANTS`, optionally with ":" and hyperparameters, separated by commas.

    Returns:
        The entrant.

    Raises:
        ValueError: the name is unknown, or a hyperparameter has no number.
    """
    base, colon, given = name.partition(":")
    found = look_up("entrant", base, ENTRANTS)
    if not colon:
        return found
    try:
        pairs = [pair.split("=") for pair in given.split(",")]
        hyper = {each: value if value == AUTO else float(value) for each, value in pairs}
    except ValueError:
        raise ValueError(f"entrant is {name!r}, but after ':' it must have NAME=NUMBER, separated by commas") from None
    suffix = ", ".join(f"{each} {value if isinstance(value, str) else format(value, 'g')}" for each, value in hyper.items())
    return dataclasses.replace(found, title=f"{found.title}, {suffix}", hyper={**found.hyper, **hyper})


def format_overview() -> str:
    """Format the tasks and entrants for `python -m experiments list`."""
    lines = [f"{name:24} {each.steps} steps" for name, each in tasks.TASKS.items()]
    return "\n".join([*lines, *(f"  --entrants {name:14} {each.title}" for name, each in ENTRANTS.items())])


class Trial(NamedTuple):
    """A choice of tuning.

    Attributes:
        learning_rate: the highest learning rate of the run.
        schedule: a key of `SCHEDULES`.
    """

    learning_rate: float
    schedule: str


#: The trials that tuning chooses from, by arm. The five are among the twenty.
ARMS: dict[str, Callable[[Entrant], list[Trial]]] = {
    "defaults": lambda entrant: [Trial(entrant.base.learning_rate, "constant")],
    # Every other rate of the ten, beginning with the second: these are nearer to the defaults.
    "5 trials": lambda entrant: [Trial(rate, "cosine") for rate in entrant.base.list_learning_rates(10)[1::2]],
    "20 trials": lambda entrant: [
        Trial(rate, schedule) for schedule in SCHEDULES for rate in entrant.base.list_learning_rates(10)
    ],
}
#: The arm with all trials; the target comes from it.
WIDEST = "20 trials"


class Setting(NamedTuple):
    """A run.

    Attributes:
        task: the name of the task.
        entrant: the name of the entrant.
        trial: learning rate and schedule.
        seed: of weights and batches.
        backend: of Keras.
    """

    task: str
    entrant: str
    trial: Trial
    seed: int
    backend: str

    @property
    def key(self) -> dict[str, Any]:
        """The key of the run's record."""
        task, entrant = tasks.find_task(self.task), find_entrant(self.entrant)
        data = {"task": task.name, "edition": task.compute_edition(), "steps": task.steps, "optimizer": entrant.optimizer}
        hyper = {"hyper": dict(entrant.hyper)} if entrant.hyper else {}
        warm_up = {"warm_up": entrant.warm_up} if entrant.warm_up else {}
        return {**data, **hyper, **warm_up, **self.trial._asdict(), "seed": self.seed, "backend": self.backend}

    @property
    def rates(self) -> list[float]:
        """The learning rate of each step."""
        steps, (rate, schedule) = tasks.find_task(self.task).steps, self.trial
        warm = find_entrant(self.entrant).warm_up * steps
        shape = SCHEDULES[schedule]
        return [rate * shape(step / steps) * (min(1.0, (step + 1) / warm) if warm else 1.0) for step in range(steps)]


class Comparison:
    """The protocol on one task, applied to the records of finished runs.

    Args:
        task: the task.
        find: returns the record of a run, or None where it is not finished.
        backend: of Keras.
        entrants: the names of the entrants.
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
        """Yield the runs that tuning needs.

        Args:
            entrant: the name of the entrant.
        """
        for trial in ARMS[WIDEST](find_entrant(entrant)):
            yield from (self._make_setting(entrant, trial, seed) for seed in TUNING_SEEDS)

    def list_test_settings(self, entrant: str) -> Iterator[Setting]:
        """Yield the runs that the tables report, for the arms with finished tuning; a trial that two arms chose comes once.

        Args:
            entrant: the name of the entrant.
        """
        chosen = dict.fromkeys(self.choose_trial(entrant, arm) for arm in ARMS)
        for trial in filter(None, chosen):
            yield from (self._make_setting(entrant, trial, seed) for seed in TEST_SEEDS)

    def score_trial(self, entrant: str, trial: Trial) -> tuple[float, float] | None:
        """Compute a trial's means over the tuning seeds.

        Args:
            entrant: the name of the entrant.
            trial: the trial.

        Returns:
            The metric, negated where a high one is better, and the loss: both infinite where a run diverged. None where a
            run is not finished.
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
        """Choose the trial with the best mean validation metric, and of equal ones the one with the lower loss.

        Args:
            entrant: the name of the entrant.
            arm: the name of the arm.

        Returns:
            The trial; None while runs of the arm are missing.
        """
        trials = ARMS[arm](find_entrant(entrant))
        if len(trials) == 1:
            return trials[0]
        scores = [(self.score_trial(entrant, trial), trial) for trial in trials]
        if any(score is None for score, _ in scores):
            return None
        return min(((score, trial) for score, trial in scores if score is not None), key=lambda each: each[0])[1]

    def is_at_edge(self, entrant: str, trial: Trial) -> bool:
        """Return whether a trial has the lowest or the highest learning rate of all trials.

        Args:
            entrant: the name of the entrant.
            trial: the trial.
        """
        rates = [each.learning_rate for each in ARMS[WIDEST](find_entrant(entrant))]
        return trial.learning_rate in (min(rates), max(rates))

    def compute_target(self) -> float | None:
        """Compute the target: tuned AdamW's validation metric after 98% of the way from the first to the last.

        Returns:
            The median of the tuning runs, so that no test run affects it; None while AdamW is not tuned.
        """
        trial = self.choose_trial(BASELINE, WIDEST)
        if trial is None:
            return None
        curves = [self._find(self._make_setting(BASELINE, trial, seed)) for seed in TUNING_SEEDS]
        first, last = (statistics.median(each["curve"][place] for each in curves if each is not None) for place in (0, -1))
        return first + TARGET_PART * (last - first)

    def find_results(self, entrant: str, trial: Trial) -> list[Mapping[str, Any]] | None:
        """Find the records of the test seeds.

        Args:
            entrant: the name of the entrant.
            trial: the trial.

        Returns:
            The records in the order of the seeds; None while one is missing.
        """
        found = [self._find(self._make_setting(entrant, trial, seed)) for seed in TEST_SEEDS]
        complete = [each for each in found if each is not None]
        return complete if len(complete) == len(found) else None

    def list_tried(self, entrant: str) -> tuple[list[float], list[float]] | None:
        """List the learning rates and their mean validation metrics, with the schedule that tuning chose.

        Args:
            entrant: the name of the entrant.

        Returns:
            Learning rates, and metrics, negated where a high one is better. None while the entrant is not tuned.
        """
        best = self.choose_trial(entrant, WIDEST)
        if best is None:
            return None
        trials = [each for each in ARMS[WIDEST](find_entrant(entrant)) if each.schedule == best.schedule]
        scores = [self.score_trial(entrant, each) for each in trials]
        return [each.learning_rate for each in trials], [score[0] for score in scores if score is not None]
