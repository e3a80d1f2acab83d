"""What is told of each tensor's steps, beside the gradients that plain SGD shows, and the closed form of the first step."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
for package in ("mnist1d", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(package)

from experiments import bench, layers, tasks  # noqa: E402
from experiments.__main__ import main  # noqa: E402
from experiments.comparison import Setting, Trial  # noqa: E402

TASK = "mnist1d-mlp"
SETTING = Setting(TASK, "vsgd", Trial(0.01, "constant"), 200, keras.backend.backend())


def values(model: Any) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(each)) for each in model.trainable_variables]


def root_mean_square(array: np.ndarray) -> float:
    return math.sqrt(np.mean(np.square(array, dtype=np.float64)))


def test_the_first_step_is_as_the_gradients_and_the_prior_say() -> None:
    found = layers.watch_tensors(SETTING, [1])
    # At a learning rate of 1 SGD moves by the gradient.
    plain = bench.Bench(tasks.TASKS[TASK], keras.optimizers.SGD(1.0))
    batches = plain.start(200)
    before = values(plain.model)
    plain.train([1.0], batches)
    gradients = [old - new for old, new in zip(before, values(plain.model), strict=True)]
    assert [tensor.size for tensor in found] == [gradient.size for gradient in gradients]
    sigma = math.sqrt(30 / 31 * 2e-8 / (2e-8 + 1e-4))
    for (_, _, (first,)), gradient in zip(found, gradients, strict=True):
        assert first.gradient == pytest.approx(root_mean_square(gradient), rel=1e-3)
        assert first.sigma == pytest.approx(sigma, rel=1e-5)
        assert first.gain == pytest.approx(1 / 31, rel=1e-6)
        assert first.stuck == 1
        mean = gradient / 31
        assert first.step == pytest.approx(root_mean_square(mean / np.sqrt(mean**2 + sigma**2)), rel=1e-3)


def test_the_command_writes_a_row_for_each_large_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "TASKS", (TASK,))
    monkeypatch.setattr(layers, "STEPS", (1, 3))
    monkeypatch.setitem(tasks.TASKS, TASK, dataclasses.replace(tasks.TASKS[TASK], steps=5))
    page = tmp_path / "page.md"
    main(["layers", "--backend", keras.backend.backend(), "--page", str(page)])
    text = page.read_text(encoding="utf-8")
    steps = layers.watch_tensors(SETTING, [1, 5])
    square = sum(size * seen[0].gradient ** 2 for _, size, seen in steps) / sum(size for _, size, _ in steps)
    assert f"at steps 1, 3, 5; the first gradient's mean square is {square:.1e}:" in text
    # Of three layers, one has a bias of ten.
    assert (text.count("/kernel`"), text.count("/bias`")) == (3, 2)
