"""Records of runs that nobody made, whose metrics are functions of the setting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from experiments import tasks
from experiments.comparison import ENTRANTS, Setting

LOOKS = tasks.LOOKS


def record(task: str, validation: float, train: float = 0.5, test: float = 0.5, loss: float = 1.0) -> dict[str, Any]:
    """A finished run whose validation metric falls, or rises, in a straight line to its last.

    Args:
        task: its name.
        validation: the metric at the end.
        train: the train loss.
        test: the test metric.
        loss: of the validation split, where it is not the metric.
    """
    metric = tasks.find_task(task).metric
    first = 0.0 if metric == "accuracy" else 10.0
    ends = {"train": (1.0, train), "validation": (validation, loss), "test": (test, 1.0)}
    final = {name: {"loss": other, "accuracy": main} for name, (main, other) in ends.items()}
    if metric == "loss":
        final = {"train": {"loss": train}, "validation": {"loss": validation}, "test": {"loss": test}}
    curve = [float(each) for each in np.linspace(first, validation, LOOKS + 1)]
    return {"curve": curve, "losses": [1.0] * LOOKS, "final": final, "seconds": 1.0}


def distance(setting: Setting, best: float) -> float:
    """How many decades the learning rate is from the best one."""
    return abs(math.log10(setting.trial.learning_rate / best))


def middle(entrant: str) -> float:
    """The middle of an entrant's learning rates, by their logarithm."""
    return math.sqrt(math.prod(ENTRANTS[entrant].base.span))
