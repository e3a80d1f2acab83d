"""Define the paper's experiments as a table of settings: two data sets, four networks, five optimizers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from experiments import datasets
from experiments.names import look_up
from experiments.optimizers import OPTIMIZERS, find_optimizer

#: How many seeds, from 0, the table averages over.
SEEDS = 3

#: The title of each network; `models.MODELS` builds them.
MODELS = {"vgg16": "VGG-16-BN", "vgg19": "VGG-19-BN", "resnext": "ResNeXt-18", "convmixer": "ConvMixer-256/8"}


@dataclass(frozen=True)
class Experiment:
    """A network on a data set, as in the authors' configuration.

    Attributes:
        data: a key of `datasets.SOURCES`.
        model: a key of `MODELS`.
        batch_size: images of a step.
        iterations: steps in all.
        halve_every: the learning rate is halved each time after this many steps.
    """

    data: str
    model: str
    batch_size: int
    iterations: int
    halve_every: int


def _make_experiments() -> dict[str, Experiment]:
    found = {}
    for data, batch_size, iterations, halve_every in (
        ("cifar100", 256, 30_000, 10_000),
        ("tiny-imagenet", 128, 60_000, 20_000),
    ):
        for model in MODELS:
            size = batch_size // 2 if model == "resnext" else batch_size
            found[f"{data}-{model}"] = Experiment(data, model, size, iterations, halve_every)
    return found


EXPERIMENTS = _make_experiments()

#: Steps between two tests, the authors' number.
EVALUATE_EVERY = 500

# The learning rate of each optimizer, and hyperparameters in addition to those of `OPTIMIZERS`. The authors' configuration
# files have 0.1 and no weight decay for all; VSGD and SGD have these values here. For Adam, 0.1 must be a placeholder, and
# AdamW without decay is Adam: both have Keras' defaults.
_CHOSEN: dict[str, tuple[float, dict[str, Any]]] = {
    "vsgd": (0.1, {}),
    "constant-vsgd": (0.1, {}),
    "adam": (0.001, {}),
    "adamw": (0.001, {"weight_decay": 0.004}),
    "sgd": (0.1, {}),
}

#: The optimizers of the paper's table, in its order.
COMPARED = tuple(_CHOSEN)


@dataclass(frozen=True)
class Settings:
    """Everything that determines a run, except its data, the backend and the machine.

    Attributes:
        experiment: a key of `EXPERIMENTS`.
        optimizer: a key of `OPTIMIZERS`.
        learning_rate: at the start.
        batch_size: images of a step.
        iterations: steps in all.
        halve_every: steps after which the learning rate is halved.
        evaluate_every: steps between two tests, and between two checkpoints.
        seed: of initial weights, order and augmentation.
        hyper: further arguments of the optimizer.
    """

    experiment: str
    optimizer: str
    learning_rate: float
    batch_size: int
    iterations: int
    halve_every: int
    evaluate_every: int
    seed: int
    hyper: Mapping[str, Any] = field(default_factory=dict)

    def make_key(self, backend: str, archive_digest: str) -> dict[str, Any]:
        """Make the key that identifies the run.

        Args:
            backend: of Keras.
            archive_digest: of the data.

        Returns:
            The key, as plain data for JSON.
        """
        return {**asdict(self), "backend": backend, "data": archive_digest}


def make_settings(experiment: str, optimizer: str, seed: int = 0, **other: Any) -> Settings:
    """Make the paper's settings, with the given changes.

    Args:
        experiment: a key of `EXPERIMENTS`.
        optimizer: a key of `OPTIMIZERS`.
        seed: of initial weights, order and augmentation.
        **other: fields of `Settings` to use instead of the paper's, where not None; the items of `hyper` are merged.

    Returns:
        The settings.

    Raises:
        ValueError: a name is unknown or a number is out of its range.
    """
    setup, entry = look_up("experiment", experiment, EXPERIMENTS), find_optimizer(optimizer)
    learning_rate, hyper = _CHOSEN.get(optimizer, (entry.learning_rate, {}))
    given = {name: value for name, value in other.items() if value is not None}
    iterations = given.get("iterations", setup.iterations)
    chosen = {
        "learning_rate": learning_rate,
        "batch_size": setup.batch_size,
        "iterations": iterations,
        "halve_every": setup.halve_every,
        "evaluate_every": min(EVALUATE_EVERY, iterations),
    }
    hyper = {**entry.hyper, **hyper, **given.pop("hyper", {})}
    found = Settings(experiment, optimizer, seed=seed, hyper=hyper, **{**chosen, **given})
    at_least = {"seed": 0, "learning_rate": 0, "batch_size": 1, "iterations": 1, "halve_every": 1, "evaluate_every": 1}
    for name, least in at_least.items():
        if not least <= getattr(found, name) < math.inf:
            raise ValueError(f"{name} is {getattr(found, name)}, but must be finite and at least {least}")
    if found.iterations % found.evaluate_every:
        raise ValueError(f"iterations is {found.iterations}, but must be a multiple of evaluate_every, {found.evaluate_every}")
    return found


def has_paper_settings(key: Mapping[str, Any]) -> bool:
    """Return whether a run has the paper's settings and data, so that the table includes it.

    Args:
        key: of the run.
    """
    if key["experiment"] not in EXPERIMENTS or key["optimizer"] not in COMPARED:
        return False
    wanted = make_settings(key["experiment"], key["optimizer"], key["seed"])
    source = datasets.SOURCES[EXPERIMENTS[key["experiment"]].data]
    return key == wanted.make_key(key["backend"], source.digest)


def format_overview() -> str:
    """Format the experiments and optimizers for `python -m experiments list`."""
    lines = [
        f"{name:24} {each.iterations} steps of {each.batch_size} images, learning rate halved every {each.halve_every}"
        for name, each in EXPERIMENTS.items()
    ]
    for name in COMPARED:
        chosen = make_settings(next(iter(EXPERIMENTS)), name)
        hyper = "".join(f", {argument} {value}" for argument, value in chosen.hyper.items())
        lines.append(f"  --optimizer {name:14} {OPTIMIZERS[name].title}: learning rate {chosen.learning_rate}{hyper}")
    return "\n".join(lines)
