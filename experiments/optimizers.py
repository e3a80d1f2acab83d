"""Define the optimizers to compare: how to make each, its defaults, its range of learning rates."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.names import look_up


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of Keras.

    Attributes:
        title: its name in tables and plots.
        source: its class, as "module:class"; imported late, because the Keras backend must be chosen first.
        learning_rate: the default.
        span: the lowest and the highest learning rate to try; all spans have the same ratio.
        hyper: default arguments, in addition to the class's own defaults.
    """

    title: str
    source: str
    learning_rate: float
    span: tuple[float, float]
    hyper: Mapping[str, Any] = field(default_factory=dict)

    def make(self, learning_rate: Any = None, **hyper: Any) -> Any:
        """Make a new `keras.optimizers.Optimizer`.

        Args:
            learning_rate: a number or a schedule; None: the default.
            **hyper: arguments of the class, which override the defaults.

        Returns:
            The optimizer.
        """
        module, _, name = self.source.partition(":")
        rate = self.learning_rate if learning_rate is None else learning_rate
        return getattr(importlib.import_module(module), name)(learning_rate=rate, **{**self.hyper, **hyper})

    def list_learning_rates(self, count: int) -> list[float]:
        """Return learning rates over the whole span, with a constant ratio between neighbours.

        Args:
            count: how many, at least 2.

        Returns:
            The learning rates, in rising order.

        Raises:
            ValueError: `count` is less than 2.
        """
        if count < 2:
            raise ValueError(f"count is {count}, but must be at least 2, the ends of the span")
        low, high = self.span
        # Rounded to three digits, so that they can be typed.
        return [float(f"{low * (high / low) ** (place / (count - 1)):.3g}") for place in range(count)]


OPTIMIZERS: dict[str, Optimizer] = {
    "vsgd": Optimizer("VSGD", "vsgd.keras:VSGD", 0.01, (3e-4, 0.3)),
    "constant-vsgd": Optimizer("Constant VSGD", "vsgd.keras:ConstantVSGD", 0.01, (3e-4, 0.3)),
    "adam": Optimizer("Adam", "keras.optimizers:Adam", 0.001, (1e-4, 0.1)),
    "adamw": Optimizer("AdamW", "keras.optimizers:AdamW", 0.001, (1e-4, 0.1)),
    # Keras' own default is no momentum.
    "sgd": Optimizer("SGD with momentum", "keras.optimizers:SGD", 0.01, (1e-3, 1.0), {"momentum": 0.9}),
    "lion": Optimizer("Lion", "keras.optimizers:Lion", 0.001, (3e-5, 0.03)),
}


def find_optimizer(name: str) -> Optimizer:
    """Return the optimizer with a name.

    Args:
        name: a key of `OPTIMIZERS`.

    Returns:
        The optimizer.

    Raises:
        ValueError: the name is unknown.
    """
    return look_up("optimizer", name, OPTIMIZERS)
