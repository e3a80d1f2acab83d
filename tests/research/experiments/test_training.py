"""Training that was interrupted ends, bit for bit, where it would have ended; and what a run's course is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
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
# Checkpoints after 3, 6, 9 and 12 steps; a pass over the images is 5 steps.
SETTINGS = {"batch_size": 4, "iterations": 12, "evaluate_every": 3, "seed": 0}


class InterruptionError(Exception):
    """Stands for whatever ends a process."""


class Interrupting(keras.callbacks.Callback):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.left == 0:
            raise InterruptionError
        self.left -= 1


def new_model(seed: int) -> keras.Model:
    """One with batch normalisation, whose moving averages count, too."""
    keras.utils.set_random_seed(seed)
    layers = [
        keras.Input((8, 8, 3), dtype="uint8"),
        keras.layers.Rescaling(1 / 255),
        keras.layers.Conv2D(4, 3),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(4),
    ]
    return keras.Sequential(layers)


def fitted(folder: Path, seed: int = 0, callbacks: Iterable[keras.callbacks.Callback] = ()) -> list[np.ndarray]:
    """All that the model and its optimizer hold at the end."""
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
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended in its eleventh step, two after its third checkpoint."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(InterruptionError):
        fitted(folder, callbacks=[Interrupting(10)])
    assert [each["step"] for each in records.read_jsonl(folder / "steps.jsonl")] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10]
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


# What else a process that is killed may leave, file by file in the order of writing.
LEFT: dict[str, Callable[[Path], None]] = {
    "whole": lambda backup: None,
    "an older epoch beside the weights": lambda backup: (backup / "training_metadata.json").write_text(
        '{"epoch": 2, "batch": 0}'
    ),
    "no epoch beside the weights": lambda backup: (backup / "training_metadata.json").write_text(""),
    "half of the weights": lambda backup: cut(backup / "latest.weights.h5"),
    "half of the copy": lambda backup: cut(backup / "latest.weights.h5.bkp"),
}


def assert_same(found: list[np.ndarray], folder: Path, uninterrupted: tuple[Path, list[np.ndarray]]) -> None:
    expected_folder, expected = uninterrupted
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)
    assert (folder / "steps.jsonl").read_text() == (expected_folder / "steps.jsonl").read_text()


@pytest.mark.parametrize("left", LEFT)
def test_it_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, uninterrupted: tuple[Path, list[np.ndarray]], interrupted: Path, left: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    LEFT[left](folder / "backup")
    # From other initial weights, which must not matter.
    assert_same(fitted(folder, seed=1), folder, uninterrupted)


def test_a_first_checkpoint_that_was_cut_off_is_begun_anew(
    tmp_path: Path, uninterrupted: tuple[Path, list[np.ndarray]]
) -> None:
    with pytest.raises(InterruptionError):
        fitted(tmp_path, callbacks=[Interrupting(4)])
    assert not (tmp_path / "backup" / "latest.weights.h5.bkp").exists()
    cut(tmp_path / "backup" / "latest.weights.h5")
    assert_same(fitted(tmp_path), tmp_path, uninterrupted)


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


def test_what_is_trained_to_the_end_takes_no_step(tmp_path: Path, uninterrupted: tuple[Path, list[np.ndarray]]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted[0], folder)
    assert_same(fitted(folder, seed=1, callbacks=[Interrupting(0)]), folder, uninterrupted)


def test_metrics_are_of_each_batch_alone(tmp_path: Path) -> None:
    """The first step's from the initial weights, the tests' from the weights after 3 steps, computed by NumPy."""
    model = new_model(0)
    first, labels = batches.TrainBatches(IMAGES.train_x, IMAGES.train_y, 4, 0, 0, 12)[0]
    logits = keras.ops.convert_to_numpy(model(first, training=True))
    training.fit_model(model, OPTIMIZERS["sgd"].make(0.0), IMAGES, tmp_path, **{**SETTINGS, "iterations": 3})
    steps = records.read_jsonl(tmp_path / "steps.jsonl")
    expected = cross_entropy(logits, labels)
    assert steps[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert steps[0]["accuracy"] == np.mean(logits.argmax(1) == labels)
    test_logits = keras.ops.convert_to_numpy(model(IMAGES.test_x, training=False))
    assert steps[3]["test_loss"] == pytest.approx(cross_entropy(test_logits, IMAGES.test_y), rel=1e-5)
    assert steps[3]["test_accuracy"] == pytest.approx(np.mean(test_logits.argmax(1) == IMAGES.test_y))
    # Another batch, of which the mean is none.
    second, labels = batches.TrainBatches(IMAGES.train_x, IMAGES.train_y, 4, 0, 0, 12)[1]
    logits = keras.ops.convert_to_numpy(model(second, training=True))
    assert steps[1]["loss"] == pytest.approx(cross_entropy(logits, labels), rel=1e-5)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    logits = logits.astype(np.float64)
    chosen = logits[np.arange(len(labels)), labels]
    return float(np.mean(np.log(np.exp(logits).sum(1)) - chosen))


def test_the_course_of_a_run() -> None:
    steps = [
        {"step": 1, "loss": 4.0, "accuracy": 0.0},
        {"step": 2, "loss": 2.0, "accuracy": 0.5},
        {"step": 2, "test_loss": 3.0, "test_accuracy": 0.1},
        {"step": 3, "loss": 1.0, "accuracy": 1.0},
        {"step": 4, "loss": 0.0, "accuracy": 0.0},
        {"step": 4, "test_loss": 2.0, "test_accuracy": 0.2},
    ]
    assert training.compute_curve(steps) == {
        "step": [2, 4],
        "loss": [3.0, 0.5],
        "accuracy": [0.25, 0.5],
        "test_loss": [3.0, 2.0],
        "test_accuracy": [0.1, 0.2],
    }
    assert json.loads(json.dumps(training.compute_curve(steps))) == training.compute_curve(steps)
