"""Define the study's tasks, each with small and with large batches."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study import data
from experiments.tasks import Data, Split, Task, make_labelled_data

#: How many training examples a run evaluates at its end.
SHOWN = 1000

#: Weights of the King James text's language model, which `experiments.study.pretraining` makes.
BASE = Path(__file__).with_name("base.npz")


def load_base() -> list[np.ndarray]:
    """Load the weights of the language model that the low-rank updates start from."""
    with np.load(BASE) as arrays:
        return [arrays[name].astype(np.float32) for name in arrays.files]


def _import_networks() -> Any:
    return importlib.import_module("experiments.study.networks")


def _make_cross_entropy() -> Any:
    return importlib.import_module("experiments.networks").make_cross_entropy()


def _make_pair(
    name: str,
    title: str,
    load_splits: Callable[[], Mapping[str, Split]],
    files: Callable[[], tuple[Path, ...]],
    batch_sizes: tuple[int, int],
    **given: Any,
) -> Iterator[Task]:
    """Make two tasks that differ in the batch size.

    Args:
        name: what the tasks' names begin with.
        title: what their titles begin with.
        load_splits: loads the examples; cached.
        files: lists the data's files, whose hash is the edition.
        batch_sizes: of the tasks.
        **given: the other attributes of `Task`.
    """
    for size in batch_sizes:

        @functools.cache
        def load_data(size: int = size) -> Data:
            return make_labelled_data(load_splits(), size, SHOWN)

        yield Task(
            name=f"{name}-b{size}",
            title=f"{title}, batches of {size}",
            load_data=load_data,
            compute_edition=lambda: data.hash_files(*files()),
            **given,
        )


NEW_TASKS: dict[str, Task] = {
    task.name: task
    for pair in (
        _make_pair(
            "mnist-cnn",
            "MNIST, CNN",
            data.split_mnist,
            lambda: (data.MNIST.find(),),
            (16, 128),
            steps=400,
            metric="accuracy",
            unit="nats",
            make_network=lambda: _import_networks().make_mnist_cnn(),
            make_loss=_make_cross_entropy,
        ),
        _make_pair(
            "mnist-autoencoder",
            "MNIST, autoencoder",
            data.split_mnist_images,
            lambda: (data.MNIST.find(),),
            (16, 128),
            steps=400,
            metric="loss",
            unit="squared error an image",
            make_network=lambda: _import_networks().make_autoencoder(),
            make_loss=lambda: _import_networks().compute_squared_error,
        ),
        _make_pair(
            "mnist-lstm",
            "MNIST, LSTM of rows",
            data.split_mnist,
            lambda: (data.MNIST.find(),),
            (16, 128),
            steps=300,
            metric="accuracy",
            unit="nats",
            make_network=lambda: _import_networks().make_mnist_lstm(),
            make_loss=_make_cross_entropy,
        ),
        _make_pair(
            "mnist-transformer",
            "MNIST, transformer of patches",
            data.split_mnist,
            lambda: (data.MNIST.find(),),
            (8, 64),
            steps=300,
            metric="accuracy",
            unit="nats",
            make_network=lambda: _import_networks().make_mnist_transformer(),
            make_loss=_make_cross_entropy,
        ),
        _make_pair(
            "bible-characters",
            "King James text, characters",
            data.split_bible_characters,
            lambda: (data.KING_JAMES.find(),),
            (64, 512),
            steps=400,
            metric="loss",
            unit="nats a character",
            make_network=lambda: _import_networks().make_character_network(),
            make_loss=_make_cross_entropy,
        ),
        _make_pair(
            "shakespeare-lora",
            "Hamlet, low-rank updates",
            data.split_hamlet,
            lambda: (data.HAMLET.find(), BASE),
            (64, 512),
            steps=400,
            metric="loss",
            unit="nats a character",
            make_network=lambda: _import_networks().make_adapted_network(load_base()),
            make_loss=_make_cross_entropy,
        ),
        _make_pair(
            "shuttle-mlp",
            "space shuttle, MLP",
            data.split_shuttle,
            lambda: (data.SHUTTLE.find(),),
            (32, 256),
            steps=400,
            metric="loss",
            unit="nats",
            make_network=lambda: _import_networks().make_mlp(9, (32, 32), 2),
            make_loss=_make_cross_entropy,
        ),
        _make_pair(
            "diamonds-mlp",
            "diamonds, MLP",
            data.split_diamonds,
            lambda: (data.DIAMONDS.find(),),
            (64, 512),
            steps=800,
            metric="loss",
            unit="squared error of the standardized logarithmic price",
            make_network=lambda: _import_networks().make_mlp(26, (64, 64), 1),
            make_loss=lambda: _import_networks().compute_squared_error,
        ),
        _make_pair(
            "image-coordinates",
            "photograph, Fourier features",
            data.split_image,
            lambda: (data.CHINA.find(),),
            (64, 512),
            steps=400,
            metric="loss",
            unit="squared error of a color",
            make_network=lambda: _import_networks().make_coordinate_network(),
            make_loss=lambda: _import_networks().compute_squared_error,
        ),
        _make_pair(
            "bible-words",
            "King James text, word vectors",
            data.split_bible_words,
            lambda: (data.KING_JAMES.find(),),
            (256, 2048),
            steps=800,
            metric="loss",
            unit="weighted squared error of logarithmic counts",
            make_network=lambda: _import_networks().make_word_vectors(),
            make_loss=lambda: _import_networks().compute_weighted_squared_error,
        ),
    )
    for task in pair
}
