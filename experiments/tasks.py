"""Define small tasks that a CPU trains in seconds: a noisy quadratic, MNIST-1D, digits, characters, a VAE of digits."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.names import look_up

#: How many times a run evaluates the validation metric.
LOOKS = 25


class Split(NamedTuple):
    """Examples.

    Attributes:
        x: the model's input; several arrays are a tuple.
        y: the targets of the loss.
    """

    x: Any
    y: NDArray[Any]


class Data(NamedTuple):
    """The data of a task.

    Attributes:
        batches: returns endless mini-batches, drawn by a generator.
        splits: "train", "validation" and "test", each small enough to evaluate in one batch.
    """

    batches: Callable[[np.random.Generator], Iterator[Split]]
    splits: Mapping[str, Split]


@dataclass(frozen=True)
class Task:
    """A task. Its models and losses are imported late, because the Keras backend must be chosen first.

    Attributes:
        name: the key in `TASKS`.
        title: its name in tables and plots.
        steps: the number of steps of a run.
        metric: "accuracy", where high is better, or "loss", where low is better.
        unit: of the loss.
        load_data: loads or makes the data; cached.
        make_network: makes a model, not compiled, with weights by Keras' global seed.
        make_loss: makes the loss that the model is compiled with.
        compute_edition: returns an identifier of the data for the records, so that runs on different data do not mix.
    """

    name: str
    title: str
    steps: int
    metric: str
    unit: str
    load_data: Callable[[], Data]
    make_network: Callable[[], Any]
    make_loss: Callable[[], Any]
    compute_edition: Callable[[], str] = lambda: "1"

    @property
    def every(self) -> int:
        """The steps between looks."""
        return max(1, self.steps // LOOKS)

    @property
    def sign(self) -> int:
        """1 where a low metric is better, else -1."""
        return -1 if self.metric == "accuracy" else 1


def _import_networks() -> Any:
    return importlib.import_module("experiments.networks")


def _draw_epochs(examples: int, batch_size: int, generator: np.random.Generator) -> Iterator[NDArray[Any]]:
    """Yield indices of mini-batches, in a new order in each epoch; drop each epoch's incomplete last batch."""
    while True:
        order = generator.permutation(examples)
        yield from order[: examples // batch_size * batch_size].reshape(-1, batch_size)


def make_labelled_data(splits: Mapping[str, Split], batch_size: int, shown: int | None = None) -> Data:
    """Make data whose batches are epochs of the training examples.

    Args:
        splits: "train", "validation" and "test".
        batch_size: the number of examples of a batch.
        shown: how many training examples to evaluate; None: all.
    """
    train = splits["train"]

    def batches(generator: np.random.Generator) -> Iterator[Split]:
        for places in _draw_epochs(len(train.y), batch_size, generator):
            yield Split(train.x[places], train.y[places])

    return Data(batches, {**splits, "train": Split(train.x[:shown], train.y[:shown])})


#: Eigenvalues of the quadratic's Hessian, and the variances of its gradients' noise in their directions.
CURVATURES = (1 / np.arange(1, 101)).astype(np.float32)


@functools.cache
def make_quadratic_data() -> Data:
    """Make noise for the gradients. All splits are the same, because without noise the loss is the risk itself."""

    def batches(generator: np.random.Generator) -> Iterator[Split]:
        while True:
            noise = np.sqrt(CURVATURES) * generator.standard_normal((1, len(CURVATURES)), np.float32)
            yield Split(noise, np.zeros((1, 1), np.float32))

    risk = Split(np.zeros((1, len(CURVATURES)), np.float32), np.zeros((1, 1), np.float32))
    return Data(batches, dict.fromkeys(("train", "validation", "test"), risk))


@functools.cache
def make_mnist_1d() -> Data:
    """Make 8000 signals of 40 samples (Greydanus, 2020): 4000 for training, 2000 each for validation and test.

    Raises:
        ValueError: the package mnist1d is missing.
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise ValueError("MNIST-1D needs mnist1d: pip install mnist1d") from error
    arguments = get_dataset_args()
    arguments.num_samples, arguments.train_split = 8000, 0.5
    made = make_dataset(arguments)
    signals = np.concatenate([made["x"], made["x_test"]]).astype(np.float32)
    labels = np.concatenate([made["y"], made["y_test"]]).astype(np.int32)
    parts = {"train": slice(4000), "validation": slice(4000, 6000), "test": slice(6000, None)}
    return make_labelled_data({name: Split(signals[part], labels[part]) for name, part in parts.items()}, 100)


@functools.cache
def _split_digits() -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Load pixels from 0 to 1 and labels: 1077 for training, 360 each for validation and test, a fifth of each class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = (pixels / 16).astype(np.float32), labels.astype(np.int32)
    x, test_x, y, test_y = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
    train_x, x, train_y, y = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    return {"train": (train_x, train_y), "validation": (x, y), "test": (test_x, test_y)}


@functools.cache
def make_digit_images() -> Data:
    """Load scikit-learn's 1797 digits, 8x8 pixels from -1 to 1."""
    return make_labelled_data(
        {name: Split((2 * x - 1).reshape(-1, 8, 8, 1), y) for name, (x, y) in _split_digits().items()}, 64
    )


@functools.cache
def make_digit_codes() -> Data:
    """Load the same digits for a VAE: pixels from 0 to 1, with the noise of their codes, which is fixed in the splits."""
    size = _import_networks().CODE
    pixels = {name: x for name, (x, _) in _split_digits().items()}

    def with_noise(x: NDArray[Any], generator: np.random.Generator) -> Split:
        return Split((x, generator.standard_normal((len(x), size), np.float32)), x)

    def batches(generator: np.random.Generator) -> Iterator[Split]:
        for places in _draw_epochs(len(pixels["train"]), 64, generator):
            yield with_noise(pixels["train"][places], generator)

    fixed = np.random.default_rng(0)
    return Data(batches, {name: with_noise(x, fixed) for name, x in pixels.items()})


CONTEXT = 64
_BLOCK = 1024  # consecutive characters in the same split
_WINDOWS = {"train": 256, "validation": 64, "test": 256}  # to evaluate; few for validation, which is frequent


@functools.cache
def read_text() -> str:
    """Read the topics of Python's own help, which differ between Python's versions.

    Repeated lines of ten or more characters are left out: topics repeat one another, and the test must not contain lines of the
    training.
    """
    from pydoc_data.topics import topics

    lines, seen = [], set[str]()
    for line in "\n".join(topics[name] for name in sorted(topics)).splitlines():
        stripped = line.strip()
        if len(stripped) < 10 or stripped not in seen:
            lines.append(line)
        seen.add(stripped)
    return "\n".join(lines)


@functools.cache
def hash_text() -> str:
    """Return the start of the text's SHA-256."""
    return hashlib.sha256(read_text().encode()).hexdigest()[:12]


@functools.cache
def list_characters() -> str:
    """Return the text's characters in order."""
    return "".join(sorted(set(read_text())))


@functools.cache
def make_character_data() -> Data:
    """Split the text into blocks, each ninth for validation and each tenth for test; targets are the next characters."""
    place = {character: number for number, character in enumerate(list_characters())}
    blocks = np.array([place[each] for each in read_text()], np.int32)[: len(read_text()) // _BLOCK * _BLOCK].reshape(
        -1, _BLOCK
    )
    kind = np.arange(len(blocks)) % 10
    parts = {"train": blocks[kind < 8], "validation": blocks[kind == 8], "test": blocks[kind == 9]}

    def windows(rows: NDArray[Any], starts: NDArray[Any], part: str) -> Split:
        cut = parts[part][rows[:, None], starts[:, None] + np.arange(CONTEXT + 1)]
        return Split(cut[:, :-1], cut[:, 1:])

    def draw(part: str, count: int, generator: np.random.Generator) -> Split:
        starts = generator.integers(_BLOCK - CONTEXT, size=count)
        return windows(generator.integers(len(parts[part]), size=count), starts, part)

    def batches(generator: np.random.Generator) -> Iterator[Split]:
        while True:
            yield draw("train", 8, generator)

    fixed = np.random.default_rng(0)
    return Data(batches, {part: draw(part, count, fixed) for part, count in _WINDOWS.items()})


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="quadratic",
            title="noisy quadratic",
            steps=2000,
            metric="loss",
            unit="risk",
            load_data=make_quadratic_data,
            make_network=lambda: _import_networks().make_quadratic(CURVATURES),
            make_loss=lambda: _import_networks().return_output,
        ),
        Task(
            name="mnist1d-mlp",
            title="MNIST-1D, MLP",
            steps=2000,
            metric="accuracy",
            unit="nats",
            load_data=make_mnist_1d,
            make_network=lambda: _import_networks().make_mlp(),
            make_loss=lambda: _import_networks().make_cross_entropy(),
        ),
        Task(
            name="mnist1d-cnn",
            title="MNIST-1D, CNN",
            steps=2000,
            metric="accuracy",
            unit="nats",
            load_data=make_mnist_1d,
            make_network=lambda: _import_networks().make_cnn(),
            make_loss=lambda: _import_networks().make_cross_entropy(),
        ),
        Task(
            name="digits-convmixer",
            title="digits, ConvMixer",
            steps=400,
            metric="accuracy",
            unit="nats",
            load_data=make_digit_images,
            make_network=lambda: _import_networks().make_conv_mixer(),
            make_loss=lambda: _import_networks().make_cross_entropy(),
        ),
        Task(
            name="characters",
            title="characters, transformer",
            steps=500,
            metric="loss",
            unit="nats a character",
            load_data=make_character_data,
            make_network=lambda: _import_networks().make_transformer(len(list_characters()), CONTEXT),
            make_loss=lambda: _import_networks().make_cross_entropy(),
            compute_edition=hash_text,
        ),
        Task(
            name="digits-vae",
            title="digits, VAE",
            steps=2000,
            metric="loss",
            unit="nats an image",
            load_data=make_digit_codes,
            make_network=lambda: _import_networks().make_vae(),
            make_loss=lambda: _import_networks().compute_negative_elbo,
        ),
    )
}


def find_task(name: str) -> Task:
    """Return the task with a name; NAME@4 is four times as long, NAME@0 takes no step.

    Args:
        name: a key of `TASKS` or of the study's `NEW_TASKS`, optionally with "@" and a factor.

    Returns:
        The task.

    Raises:
        ValueError: the name is unknown, or the factor is not an integer of at least 0.
    """
    from experiments.study.tasks import NEW_TASKS  # late: it imports this module

    base, at, factor = name.partition("@")
    task = look_up("task", base, {**TASKS, **NEW_TASKS})
    if not at:
        return task
    if not factor.isdecimal():
        raise ValueError(f"task is {name!r}, but after '@' it must have an integer of at least 0")
    return dataclasses.replace(task, name=name, title=f"{task.title}, {factor} times as long", steps=int(factor) * task.steps)
