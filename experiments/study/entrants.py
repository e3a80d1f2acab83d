"""Define the optimizers of the study, all in optax, and the space that random search draws their settings from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import optax
from optax import contrib

from vsgd.optax import constant_vsgd, vsgd

SCHEDULES = ("cosine", "constant")

#: The axes of an array that a layer sums over, and those of its output.
Axes = tuple[tuple[int, ...], tuple[int, ...]]


class Setting(NamedTuple):
    """What a user sets: an optimizer's hyperparameters and the shape of its learning rate.

    Attributes:
        learning_rate: of the run; the warm-up and the cosine multiply it.
        schedule: "cosine", which falls to 0, or "constant".
        warm_up: the part of the run in which the learning rate rises linearly.
        beta1: the decay of the momentum; for VSGD the decay that its first gain has, `variance_ratio / (1 + variance_ratio)`.
        weight_decay: decoupled and multiplied by the learning rate, except for Adam and SGD, which add it to the gradient.
    """

    learning_rate: float
    schedule: str
    warm_up: float
    beta1: float
    weight_decay: float

    def list_rates(self, steps: int) -> list[float]:
        """List the learning rate of each step.

        Args:
            steps: of the run.
        """
        rises = (min(1.0, (step + 1) / (self.warm_up * steps)) if self.warm_up else 1.0 for step in range(steps))
        if self.schedule == "constant":
            return [self.learning_rate * rise for rise in rises]
        return [self.learning_rate * rise * (1 + math.cos(math.pi * step / steps)) / 2 for step, rise in enumerate(rises)]


@dataclass(frozen=True)
class Entrant:
    """An optimizer of the study.

    Attributes:
        title: its name in tables and plots.
        make: makes the optax transformation of a learning rate, `beta1`, a weight decay, and the axes of hidden matrices.
        center: the middle of the learning rates to try.
        beta1: the default.
        weight_decay: the default.
        warm_ups: the parts of a run to try.
        coupled_decay: whether the weight decay is added to the gradient.
        schedules: those that the optimizer is run with; a schedule-free one has "constant" alone.
    """

    title: str
    make: Callable[[Any, Any, Any, Sequence[Axes | None]], Any]
    center: float
    beta1: float = 0.9
    weight_decay: float = 0.0
    warm_ups: tuple[float, ...] = (0.0, 0.2)
    coupled_decay: bool = False
    schedules: tuple[str, ...] = SCHEDULES

    @property
    def decay_span(self) -> tuple[float, float]:
        """The lowest and the highest weight decay that random search draws, a factor of 1000 apart.

        The product of a decoupled decay and the central learning rate, which shrinks the weights, is the same for all.
        """
        low = 1e-6 if self.coupled_decay else 4e-6 / self.center
        return low, 1000 * low

    def list_grid(self, schedule: str) -> list[Setting]:
        """List the settings among which the one setting is chosen: learning rates by factors of two, and the warm-ups.

        Args:
            schedule: one of `schedules`.
        """
        rates = [float(f"{self.center * 2.0**power:.3g}") for power in range(-3, 4)]
        return [Setting(rate, schedule, part, self.beta1, self.weight_decay) for part in self.warm_ups for rate in rates]

    def draw_setting(self, generator: np.random.Generator) -> Setting:
        """Draw a setting for the study of budgets.

        The learning rate and the weight decay each span a factor of 1000, the warm-up is 0 to 0.3 of the
        run, and `1 - beta1` 0.02 to 0.5; all but the warm-up are uniform in their logarithms.

        Args:
            generator: the source of randomness.
        """
        rate, decay, forget = generator.uniform(-1.5, 1.5), generator.uniform(), generator.uniform()
        low, high = self.decay_span
        drawn = (
            self.center * 10**rate,
            generator.uniform(0, 0.3),
            1 - 0.02 * 25**forget,
            low * (high / low) ** decay,
        )
        rate, warm_up, beta1, weight_decay = (float(f"{each:.3g}") for each in drawn)
        return Setting(rate, self.schedules[0], warm_up, beta1, weight_decay)


def _make_calibrated(rate: Any, beta1: Any, decay: Any, matrices: Sequence[Axes | None]) -> Any:
    ratio = beta1 / (1 - beta1)
    return constant_vsgd(rate, variance_ratio=ratio, weight_decay=decay, prior_strength="auto", forgetting_floor=0.01)


def _make_muon(rate: Any, beta1: Any, decay: Any, matrices: Sequence[Axes | None]) -> Any:
    return contrib.muon(
        rate,
        beta=beta1,
        weight_decay=decay,
        adam_weight_decay=decay,
        muon_weight_dimension_numbers=[contrib.MuonDimensionNumbers(*each) if each else None for each in matrices],
        consistent_rms=0.2,  # one learning rate then suits Muon's matrices and AdamW's other arrays
    )


ENTRANTS: dict[str, Entrant] = {
    "calibrated": Entrant(
        "Constant VSGD, self-calibrating",
        _make_calibrated,
        center=0.008,
        beta1=0.75,
    ),
    "constant-vsgd": Entrant(
        "Constant VSGD",
        lambda rate, beta1, decay, _: constant_vsgd(rate, variance_ratio=beta1 / (1 - beta1), weight_decay=decay),
        center=0.008,
        beta1=0.75,
    ),
    "vsgd": Entrant(
        "VSGD",
        lambda rate, beta1, decay, _: vsgd(rate, variance_ratio=beta1 / (1 - beta1), weight_decay=decay),
        center=0.008,
        beta1=30 / 31,
    ),
    "schedule-free-calibrated": Entrant(
        "Constant VSGD, self-calibrating, schedule-free",
        lambda rate, beta1, decay, _: contrib.schedule_free(_make_calibrated(rate, 0.75, decay, _), rate, b1=beta1),
        center=0.016,
        schedules=("constant",),
    ),
    "adamw-warm": Entrant(
        "AdamW, 20% warm-up, betas 0.75 and 0.99",
        lambda rate, beta1, decay, _: optax.adamw(rate, b1=beta1, b2=0.99, weight_decay=decay),
        center=0.008,
        beta1=0.75,
        weight_decay=0.01,
        warm_ups=(0.2,),
    ),
    "adamw": Entrant(
        "AdamW",
        lambda rate, beta1, decay, _: optax.adamw(rate, b1=beta1, weight_decay=decay),
        center=0.004,
        weight_decay=0.01,
    ),
    "schedule-free-adamw": Entrant(
        "AdamW, schedule-free",
        lambda rate, beta1, decay, _: contrib.schedule_free(optax.adamw(rate, b1=0.0, weight_decay=decay), rate, b1=beta1),
        center=0.008,
        weight_decay=0.01,
        schedules=("constant",),
    ),
    "adam": Entrant(
        "Adam",
        lambda rate, beta1, decay, _: optax.chain(optax.add_decayed_weights(decay), optax.adam(rate, b1=beta1)),
        center=0.004,
        coupled_decay=True,
    ),
    "adabelief": Entrant(
        "AdaBelief",
        lambda rate, beta1, decay, _: optax.chain(
            optax.scale_by_belief(b1=beta1), optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate)
        ),
        center=0.004,
    ),
    "muon": Entrant("Muon with AdamW", _make_muon, center=0.008, beta1=0.95, weight_decay=0.01),
    "sgd": Entrant(
        "SGD with momentum",
        lambda rate, beta1, decay, _: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=beta1)),
        center=0.05,
        coupled_decay=True,
    ),
}
