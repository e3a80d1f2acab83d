"""Do one training run on Keras: write the metrics of each step, resume after a kill, and store a record."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from experiments import batches, datasets, models, records
from experiments.optimizers import OPTIMIZERS
from experiments.paper import EXPERIMENTS, Settings

BACKEND = keras.backend.backend()


class _Last(keras.metrics.Metric):
    """The mean of only the last batch, where Keras' own metrics average until the epoch's end."""

    def __init__(self, function: Any, name: str) -> None:
        super().__init__(name=name)
        self.function = function
        self.value = self.add_variable((), initializer="zeros", name="value")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.value.assign(keras.ops.mean(self.function(y_true, y_pred)))

    def result(self) -> Any:
        return self.value.value


class _Watch(keras.callbacks.Callback):
    """Writes the metrics of each step, and of the test images at each epoch's end."""

    def __init__(self, steps: records.Steps, taken: int) -> None:
        super().__init__()
        self.steps = steps
        self.taken = taken

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        assert logs is not None
        self.taken += 1
        self.steps.write(self.taken, **{name: float(logs[f"batch_{name}"]) for name in ("loss", "accuracy")})

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        assert logs is not None
        self.steps.write(self.taken, **{f"test_{name}": float(logs[f"val_{name}"]) for name in ("loss", "accuracy")})


class _Backup(keras.callbacks.BackupAndRestore):
    """Keras' own, except that the optimizer's count of steps determines where training resumes."""

    def __init__(self, folder: Path, steps_per_epoch: int) -> None:
        # Keep the previous checkpoint, since a process may be killed while it writes; keep both until the record exists.
        super().__init__(str(folder), double_checkpoint=True, delete_checkpoint=False)
        self.steps_per_epoch = steps_per_epoch

    def on_train_begin(self, logs: Any = None) -> None:
        # Keras writes this file after the weights: it may be older than they are, or cut off.
        Path(self.backup_dir, "training_metadata.json").unlink(missing_ok=True)
        try:
            super().on_train_begin(logs)
        except OSError:
            # No checkpoint is complete: the process was killed during its first one. The model is unchanged.
            shutil.rmtree(self.backup_dir)
        self.model._initial_epoch = count_steps(self.model) // self.steps_per_epoch


def count_steps(model: keras.Model) -> int:
    """Count the steps that a model's optimizer took.

    Args:
        model: a compiled model.
    """
    return int(keras.ops.convert_to_numpy(model.optimizer.iterations))


def fit_model(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    images: datasets.Images,
    folder: Path,
    *,
    batch_size: int,
    iterations: int,
    evaluate_every: int,
    seed: int,
    verbose: int = 0,
    callbacks: Iterable[keras.callbacks.Callback] = (),
) -> None:
    """Train a model, or resume where an earlier process was killed.

    Args:
        model: from bytes of pixels to logits.
        optimizer: a new optimizer.
        images: the training and test images.
        folder: of the run: gets the metrics as `steps.jsonl` and the checkpoints as `backup`.
        batch_size: images of a step.
        iterations: steps in all.
        evaluate_every: steps between two tests, and between two checkpoints; `iterations` is a multiple.
        seed: of order and augmentation.
        verbose: of `keras.Model.fit`: 1 shows progress bars.
        callbacks: additional ones.
    """
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        optimizer=optimizer,
        loss=loss,
        metrics=["accuracy", _Last(loss, "batch_loss"), _Last(keras.metrics.sparse_categorical_accuracy, "batch_accuracy")],
    )
    backup = _Backup(folder / "backup", evaluate_every)
    backup.set_model(model)
    backup.on_train_begin()  # now, because the batches start where it resumes
    taken = count_steps(model)
    if taken == iterations:
        return
    with records.Steps(folder / "steps.jsonl", after=taken) as steps:
        model.fit(
            batches.TrainBatches(images.train_x, images.train_y, batch_size, seed, taken, iterations),
            steps_per_epoch=evaluate_every,
            epochs=iterations // evaluate_every,
            shuffle=False,  # the batches are shuffled already
            validation_data=batches.TestBatches(images.test_x, images.test_y, batch_size),
            # The metrics first: they must not be older than the checkpoint.
            callbacks=[_Watch(steps, taken), backup, *callbacks],
            verbose=verbose,
        )


def compute_curve(steps: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """Compute the curve of a run: the test metrics, and the training metrics averaged since the test before.

    Args:
        steps: the lines of `steps.jsonl`.

    Returns:
        The values at each test, by metric.
    """
    found: dict[str, list[float]] = {name: [] for name in ("step", "loss", "accuracy", "test_loss", "test_accuracy")}
    since: list[Mapping[str, float]] = []
    for each in steps:
        if "loss" in each:
            since.append(each)
            continue
        found["step"].append(each["step"])
        for name in ("loss", "accuracy"):
            found[name].append(_round_number(float(np.mean([step[name] for step in since]))))
            found[f"test_{name}"].append(_round_number(each[f"test_{name}"]))
        since = []
    return found


def _round_number(value: float) -> float:
    return float(f"{value:.6g}")


def _find_gpu() -> str | None:
    """Return the name of the GPU that the backend trains on; None without one."""
    if BACKEND == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if BACKEND == "jax":
        import jax

        device = jax.devices()[0]
        return device.device_kind if device.platform == "gpu" else None
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(devices[0]).get("device_name", "GPU") if devices else None


def run_training(
    chosen: Settings,
    images: datasets.Images,
    digest: str,
    finished: records.Records,
    output: Path,
    *,
    verbose: int = 0,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Do one of the paper's runs, or resume it, and record it.

    Args:
        chosen: the run's settings.
        images: the data.
        digest: of the data's archive.
        finished: the records that the run's record joins.
        output: the folder that has a folder for each run.
        verbose: of `keras.Model.fit`.
        tensorboard: whether Keras also writes TensorBoard files into the run's folder.

    Returns:
        The record.
    """
    setup = EXPERIMENTS[chosen.experiment]
    source = datasets.SOURCES[setup.data]
    key = chosen.make_key(BACKEND, digest)
    folder = output / records.name_folder(key, chosen.experiment, chosen.optimizer, BACKEND, f"seed{chosen.seed}")
    keras.backend.clear_session()  # forget the previous run of this process
    keras.utils.set_random_seed(chosen.seed)
    model = models.build_model(setup.model, source.side, source.classes, source.mean, source.deviation)
    schedule = keras.optimizers.schedules.ExponentialDecay(chosen.learning_rate, chosen.halve_every, 0.5, staircase=True)
    optimizer = OPTIMIZERS[chosen.optimizer].make(schedule, **chosen.hyper)
    about = {
        "environment": records.describe_run_environment(_find_gpu()),
        "parameters": sum(int(np.prod(each.shape)) for each in model.trainable_variables),
        "optimizer": keras.optimizers.serialize(optimizer)["config"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"key": key, **about}, indent=1) + "\n", encoding="utf-8")
    fit_model(
        model,
        optimizer,
        images,
        folder,
        batch_size=chosen.batch_size,
        iterations=chosen.iterations,
        evaluate_every=chosen.evaluate_every,
        seed=chosen.seed,
        verbose=verbose,
        callbacks=[keras.callbacks.TensorBoard(str(folder / "tensorboard"), write_graph=False)] if tensorboard else [],
    )
    record = finished.append(key, **about, curve=compute_curve(records.read_jsonl(folder / "steps.jsonl")))
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder / "backup")
    return record
