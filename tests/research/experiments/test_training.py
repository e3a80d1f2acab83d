"""Test that an interrupted training ends bit for bit like an uninterrupted one, and what a run records."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("keras")

import keras

from experiments import batches, datasets, records, training
from experiments.optimizers import OPTIMIZERS

RNG = np.random.default_rng(5)
IMAGES = datasets.Images(
    train_x=RNG.integers(0, 256, (20, 8, 8, 3), np.uint8),
    train_y=RNG.integers(0, 4, 20).astype(np.int32),
    test_x=RNG.integers(0, 256, (7, 8, 8, 3), np.uint8),
    test_y=RNG.integers(0, 4, 7).astype(np.int32),
)
# There are checkpoints after 3, 6, 9 and 12 steps; a pass over the images is 5 steps.
SETTINGS = {"batch_size": 4, "iterations": 12, "evaluate_every": 3, "seed": 0}


class InterruptionError(Exception):
    """Stands for any cause that ends a process."""


class Interrupting(keras.callbacks.Callback):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.left == 0:
            raise InterruptionError
        self.left -= 1


def new_model(seed: int) -> keras.Model:
    """Return a model with batch normalisation, whose moving averages count too."""
    keras.utils.set_random_seed(seed)
    network = [keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)]
    return keras.Sequential([keras.Input((8, 8, 3), dtype="uint8"), keras.layers.Rescaling(1 / 255), *network, *head])


def fitted(folder: Path, seed: int = 0, callbacks: Iterable[keras.callbacks.Callback] = ()) -> list[np.ndarray]:
    """Return all arrays of the model and its optimizer after training."""
    model = new_model(seed)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5, staircase=True)
    optimizer = OPTIMIZERS["vsgd"].make(schedule)
    training.fit_model(model, optimizer, IMAGES, folder, callbacks=callbacks, **SETTINGS)
    return [np.array(keras.ops.convert_to_numpy(each)) for each in (*model.variables, *optimizer.variables)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, fitted(folder)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return the folders of runs that ended after four steps, which is one after the first checkpoint, and after ten."""
    folders = {steps: tmp_path_factory.mktemp("interrupted") for steps in (4, 10)}
    for steps, folder in folders.items():
        with pytest.raises(InterruptionError):
            fitted(folder, callbacks=[Interrupting(steps)])
    return folders


# What else a killed process may leave, file by file in the order of writing: the steps it took, the file, and its text; without
# a text, the file's end is missing.
LEFT = {
    "whole": (10, None, None),
    "an older epoch beside the weights": (10, "training_metadata.json", '{"epoch": 2, "batch": 0}'),
    "no epoch beside the weights": (10, "training_metadata.json", ""),
    "half of the weights": (10, "latest.weights.h5", None),
    "half of the copy": (10, "latest.weights.h5.bkp", None),
    "half of the first weights": (4, "latest.weights.h5", None),
}


def assert_same(found: list[np.ndarray], folder: Path, uninterrupted: tuple[Path, list[np.ndarray]]) -> None:
    expected_folder, expected = uninterrupted
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)
    assert (folder / "steps.jsonl").read_text() == (expected_folder / "steps.jsonl").read_text()


@pytest.mark.parametrize("left", LEFT)
def test_it_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, uninterrupted: tuple[Path, list[np.ndarray]], interrupted: dict[int, Path], left: str
) -> None:
    steps, file, text = LEFT[left]
    folder = shutil.copytree(interrupted[steps], tmp_path / "run")
    assert [each["step"] for each in records.read_jsonl(folder / "steps.jsonl")][-1] == steps
    if file is not None:
        path = folder / "backup" / file
        path.write_bytes(path.read_bytes()[:-100] if text is None else text.encode())
    # The initial weights differ, which must not matter if there is a checkpoint.
    assert_same(fitted(folder, seed=0 if steps == 4 else 1), folder, uninterrupted)


def test_a_test_whose_metrics_were_not_written_is_done_again(
    tmp_path: Path, uninterrupted: tuple[Path, list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = records.Steps.write

    def interrupted_write(steps: records.Steps, step: int, **metrics: float) -> None:
        if step == 6 and "test_loss" in metrics:
            raise InterruptionError
        write(steps, step, **metrics)

    with monkeypatch.context() as patched:
        patched.setattr(records.Steps, "write", interrupted_write)
        with pytest.raises(InterruptionError):
            fitted(tmp_path)
    assert_same(fitted(tmp_path, seed=1), tmp_path, uninterrupted)
    # A finished training takes no further step.
    assert_same(fitted(tmp_path, seed=1, callbacks=[Interrupting(0)]), tmp_path, uninterrupted)


def cross_entropy(logits: Any, labels: np.ndarray) -> Any:
    logits = keras.ops.convert_to_numpy(logits).astype(np.float64)
    loss = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels])
    return pytest.approx([loss, np.mean(logits.argmax(1) == labels)], rel=1e-5)


def test_metrics_are_of_each_batch_alone(tmp_path: Path) -> None:
    """The steps' metrics come from the initial weights, the tests' from the weights after 3 steps; NumPy computes both."""
    model = new_model(0)
    shown = batches.TrainBatches(IMAGES.train_x, IMAGES.train_y, 4, 0, 0, 12)
    expected = [cross_entropy(model(shown[step][0], training=True), shown[step][1]) for step in range(2)]
    training.fit_model(model, OPTIMIZERS["sgd"].make(0.0), IMAGES, tmp_path, **{**SETTINGS, "iterations": 3})
    steps = records.read_jsonl(tmp_path / "steps.jsonl")
    assert [[each["loss"], each["accuracy"]] for each in steps[:2]] == expected
    assert [steps[3]["test_loss"], steps[3]["test_accuracy"]] == cross_entropy(
        model(IMAGES.test_x, training=False), IMAGES.test_y
    )
