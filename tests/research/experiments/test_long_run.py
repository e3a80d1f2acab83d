"""The script that makes the table of long runs in `docs/tuning.md`, in a small setting."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")
for package in ("scipy", "sklearn", "tqdm"):
    pytest.importorskip(package)

from experiments import bench, comparison, tasks  # noqa: E402
from experiments.tuning import long_run  # noqa: E402


def test_gains_are_set_where_they_are_to_be_and_the_sum_of_rates_stays() -> None:
    run = bench.Bench(tasks.find_task("digits-vae"), comparison.find_entrant("vsgd").make())
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
    # The same run until gains are set.
    assert (held[2], held[4]) == (default[2], default[4])
    assert held[5] != default[5]
    assert 0 < float(held[4]) < 100
    assert int(held[6]) > 0 == len(default[6])
    assert [row[0] for row in others] == [run.title for run in long_run.RUNS[2:]]
