"""The paper's experiments as a table of settings: two data sets, four networks, five optimizers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from experiments import datasets
from experiments.names import look_up
from experiments.optimizers import OPTIMIZERS, find_optimizer

#: How many seeds, from 0, the table's means are over.
SEEDS = 3

#: What each network is called; `models.MODELS` makes them.
MODELS = {"vgg16": "VGG-16-BN", "vgg19": "VGG-19-BN", "resnext": "ResNeXt-18", "convmixer": "ConvMixer-256/8"}


@dataclass(frozen=True)
class Experiment:
    """A network on a data set, as the authors' configuration has it.

    Attributes:
        data: a key of `datasets.SOURCES`.
        model: a key of `MODELS`.
        batch_size: images of a step.
        iterations: steps in all.
        halve_every: steps after which the learning rate is halved, again and again.
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

#: Steps between two looks at the test images, the authors' too.
EVALUATE_EVERY = 500

# The learning rate of each optimizer, and hyperparameters besides `OPTIMIZERS`' own. The authors' configuration files name 0.1
# and no weight decay for all; VSGD and SGD have that here. For Adam, 0.1 can only stand to be replaced, and with no decay AdamW
# is Adam: both have Keras' defaults.
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
    """All that decides a run but its data, the backend, and the machine.

    Attributes:
        experiment: a key of `EXPERIMENTS`.
        optimizer: a key of `OPTIMIZERS`.
        learning_rate: at the start.
        batch_size: images of a step.
        iterations: steps in all.
        halve_every: steps after which the learning rate is halved.
        evaluate_every: steps between two looks at the test images, and two checkpoints.
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
        """What identifies the run.

        Args:
            backend: of Keras.
            archive_digest: of the data.
        """
        return {**asdict(self), "backend": backend, "data": archive_digest}


def make_settings(experiment: str, optimizer: str, seed: int = 0, **other: Any) -> Settings:
    """The paper's settings, but for what is named.

    Args:
        experiment: a key of `EXPERIMENTS`.
        optimizer: a key of `OPTIMIZERS`.
        seed: of initial weights, order and augmentation.
        **other: fields of `Settings` that are not None, instead of the paper's; of `hyper` those that it has.

    Raises:
        ValueError: a name is unknown, or a number out of its range.
    """
    setup, known = look_up("experiment", experiment, EXPERIMENTS), find_optimizer(optimizer)
    learning_rate, hyper = _CHOSEN.get(optimizer, (known.learning_rate, {}))
    given = {name: value for name, value in other.items() if value is not None}
    iterations = given.get("iterations", setup.iterations)
    chosen = {
        "learning_rate": learning_rate,
        "batch_size": setup.batch_size,
        "iterations": iterations,
        "halve_every": setup.halve_every,
        "evaluate_every": min(EVALUATE_EVERY, iterations),
    }
    hyper = {**known.hyper, **hyper, **given.pop("hyper", {})}
    found = Settings(experiment, optimizer, seed=seed, hyper=hyper, **{**chosen, **given})
    at_least = {"seed": 0, "learning_rate": 0, "batch_size": 1, "iterations": 1, "halve_every": 1, "evaluate_every": 1}
    for name, least in at_least.items():
        if not least <= getattr(found, name) < math.inf:
            raise ValueError(f"{name} is {getattr(found, name)}, but must be finite and at least {least}")
    if found.iterations % found.evaluate_every:
        raise ValueError(f"iterations is {found.iterations}, but must be a multiple of evaluate_every, {found.evaluate_every}")
    return found


def has_paper_settings(key: Mapping[str, Any]) -> bool:
    """Whether a run has the paper's settings and data, so that its result stands in the table.

    Args:
        key: of the run.
    """
    if key["experiment"] not in EXPERIMENTS or key["optimizer"] not in COMPARED:
        return False
    wanted = make_settings(key["experiment"], key["optimizer"], key["seed"])
    source = datasets.SOURCES[EXPERIMENTS[key["experiment"]].data]
    return key == wanted.make_key(key["backend"], source.digest)


def format_overview() -> str:
    """What `python -m experiments list` prints of these experiments."""
    lines = [
        f"{name:24} {each.iterations} steps of {each.batch_size} images, learning rate halved every {each.halve_every}"
        for name, each in EXPERIMENTS.items()
    ]
    for name in COMPARED:
        chosen = make_settings(next(iter(EXPERIMENTS)), name)
        hyper = "".join(f", {argument} {value}" for argument, value in chosen.hyper.items())
        lines.append(f"  --optimizer {name:14} {OPTIMIZERS[name].title}: learning rate {chosen.learning_rate}{hyper}")
    return "\n".join(lines)
