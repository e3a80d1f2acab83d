"""Test what is measured of each tensor, by SGD's gradients and closed forms, and long runs whose gains are set."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from research.scripts import need

keras = pytest.importorskip("keras")
need("mnist1d", "scipy", "sklearn", "tqdm")

from experiments import bench, layers, tasks  # noqa: E402
from experiments.__main__ import main  # noqa: E402
from experiments.comparison import Setting, Trial, find_entrant  # noqa: E402
from experiments.tuning import long_run  # noqa: E402

TASK = "mnist1d-mlp"
SETTING = Setting(TASK, "vsgd", Trial(0.01, "constant"), 200, keras.backend.backend())


def values(model: Any) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(each)) for each in model.trainable_variables]


def root_mean_square(array: np.ndarray) -> float:
    return math.sqrt(np.mean(np.square(array, dtype=np.float64)))


def test_the_first_step_is_as_the_gradients_and_the_prior_say() -> None:
    found = layers.watch_tensors(SETTING, [1])
    # At a learning rate of 1, SGD moves by the gradient.
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
    # There are three layers, one of them with a bias of ten elements.
    assert (text.count("/kernel`"), text.count("/bias`")) == (3, 2)


# Long runs


def test_gains_are_set_where_they_are_to_be_and_the_sum_of_rates_stays() -> None:
    run = bench.Bench(tasks.find_task("digits-vae"), find_entrant("vsgd").make())
    run.train([0.01] * 5, run.start(0))
    optimizer, variable = run.optimizer, run.model.trainable_variables[0]

    def seen() -> tuple[np.ndarray, np.ndarray]:
        tail = variable.path.replace("/", "_")
        states = {each.path.rpartition("/")[2]: keras.ops.convert_to_numpy(each) for each in optimizer.variables}
        return keras.ops.convert_to_numpy(optimizer.posterior(variable).gain), states[f"{tail}_b_g"] + states[f"{tail}_b_ghat"]

    (before, total), where = seen(), np.zeros(variable.shape, bool)
    where[::2] = True
    assert long_run.set_gains(optimizer, variable, where) == where.sum()
    after, new_total = seen()
    np.testing.assert_allclose(after[where], 0.3, rtol=1e-5)
    np.testing.assert_array_equal(after[~where], before[~where])
    np.testing.assert_allclose(new_total, total, rtol=1e-6)
    assert np.median(np.abs(before - 0.3)) > 0.1


def test_the_command_makes_a_row_for_each_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--steps", "10", "--looks", "5", "10", "--seeds", "0", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["long_run.py", *given])
    monkeypatch.setattr(long_run, "EVERY", 5)
    monkeypatch.setattr(long_run, "HIGH", 0.45)
    held_run = long_run.RUNS[0]._replace(reset=lambda gain: gain > 0.45)
    monkeypatch.setattr(long_run, "RUNS", [held_run, *long_run.RUNS])
    long_run.main()
    text = (tmp_path / "long_run.txt").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    head, _, held, default, *others = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    assert head[2:4] == ["train loss, step 5", "train loss, step 10"]
    # Both runs are equal until gains are set.
    assert (held[2], held[4]) == (default[2], default[4])
    assert held[5] != default[5]
    assert 0 < float(held[4]) < 100
    assert int(held[6]) > 0 == len(default[6])
    assert [row[0] for row in others] == [run.title for run in long_run.RUNS[2:]]
