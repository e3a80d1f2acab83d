"""The tables of VSGD's hyperparameters, of records that are made up; and that the command fills a page."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import pytest

for package in ("keras", "scipy", "tqdm"):
    pytest.importorskip(package)

import keras  # noqa: E402
from research.made_up_runs import diverged, record  # noqa: E402

from experiments import spread, sweep, tasks  # noqa: E402
from experiments.__main__ import main  # noqa: E402
from experiments.comparison import ENTRANTS, Setting, Trial, find_entrant  # noqa: E402
from experiments.paper_report import MISSING  # noqa: E402

PRIOR, KAPPAS, *LONG = sweep.GRIDS
TASK = tasks.TASKS["mnist1d-mlp"]


def rows_of(table: str) -> list[list[str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return lines[2:]


def bowl(setting: Setting) -> dict[str, Any]:
    """Best at the second rate; hyperparameters add to the loss, and each seed to all of its runs."""
    place = sweep.RATES.index(setting.trial.learning_rate)
    shift = sum(find_entrant(setting.entrant).hyper.values()) + 0.1 * (setting.seed - 200)
    return record(TASK.name, 0.9 - 0.01 * abs(place - 1) - 0.1 * shift, train=1 + abs(place - 1) + shift)


def test_grids_hold_the_default_and_what_the_optimizer_takes() -> None:
    from vsgd import core

    defaults = core.VSGD.hyperparameters()
    for grid in sweep.GRIDS:
        values = [each for each, entrant in grid.entrants.items() if entrant == sweep.DEFAULT]
        assert values == [tuple(getattr(defaults, head) for head in grid.heads)]
        for each, entrant in grid.entrants.items():
            if entrant != sweep.DEFAULT:
                assert find_entrant(entrant).hyper == dict(zip(grid.heads, each, strict=True))
                find_entrant(entrant).make()
    assert {1e-14, 1e-2} <= {value for (value,) in PRIOR.entrants}
    tried = {trial.learning_rate for grid in sweep.GRIDS for trial in grid.trials}
    assert set(sweep.RATES) < tried < set(ENTRANTS["vsgd"].base.list_learning_rates(10))


def test_the_best_rate_is_marked_and_differences_are_seed_by_seed() -> None:
    rows = rows_of(sweep.format_grid_table(TASK, KAPPAS, bowl, "jax"))
    assert len(rows) == len(KAPPAS.entrants)
    for (values, entrant), (one, two, *cells) in zip(KAPPAS.entrants.items(), rows, strict=True):
        assert (float(one), float(two)) == values
        shift = 0.0 if entrant == sweep.DEFAULT else sum(values)
        # The mean of the seeds' parts is 0.1.
        losses = [float(cell.strip("*")) for cell in cells[:4]]
        assert losses == pytest.approx([2.1 + shift, 1.1 + shift, 2.1 + shift, 3.1 + shift], rel=1e-3)
        assert [cell.startswith("**") for cell in cells[:4]] == [False, True, False, False]
        accuracies = [float(cell.strip("*")) for cell in cells[5:9]]
        assert accuracies == pytest.approx([100 * (0.9 - off - 0.1 * (shift + 0.1)) for off in (0.01, 0, 0.01, 0.02)], abs=0.01)
        assert [cell.startswith("**") for cell in cells[5:9]] == [False, True, False, False]
        if entrant == sweep.DEFAULT:
            assert cells[4] == cells[9] == ""
        else:
            # What seeds have of their own cancels.
            for cell, expected in ((cells[4], shift), (cells[9], -10 * shift)):
                assert [float(each) for each in cell.replace("(", "").replace(")", "").replace("to ", "").split()] == (
                    pytest.approx([expected] * 3, rel=0.05)
                )


def test_differences_have_the_least_and_the_most() -> None:
    ours = sweep.Scores([[3.0, 9.0, 9.0], [1.0, 2.0, 6.0]], 1)
    other = sweep.Scores([None, [1.5, 1.0, 1.0]], 1)
    assert (ours.best, other.best) == (1, 1)
    assert ours.format_difference(other) == f"{statistics.fmean([-0.5, 1.0, 5.0]):+.2g} (-0.5 to +5)"
    assert sweep.Scores([[3.0], [1.0]], -1).best == 0
    assert sweep.Scores([None], 1).format_difference(other) == ""


def test_what_is_missing_or_diverged_says_so() -> None:
    (*_, weakest), *_ = PRIOR.entrants.items()

    def some(setting: Setting) -> dict[str, Any] | None:
        if setting.entrant != weakest[-1] and setting.entrant != sweep.DEFAULT:
            return None
        return diverged() if setting.trial == PRIOR.trials[-1] and setting.seed == 201 else bowl(setting)

    rows = {float(row[0]): row[1:] for row in rows_of(sweep.format_grid_table(TASK, PRIOR, some, "jax"))}
    assert rows[1e-2] == [*[MISSING] * 4, "", *[MISSING] * 4, ""]
    assert rows[1e-8][3] == rows[1e-8][8] == "diverged"
    assert rows[1e-8][1].startswith("**")


def test_the_command_runs_what_is_missing_and_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of made-up runs, one is left to do.
    backend = keras.backend.backend()
    small = [grid._replace(tasks=("quadratic",), trials=(Trial(0.03, "cosine"),)) for grid in (PRIOR, KAPPAS)]
    long = [grid._replace(tasks=("quadratic@2",), trials=(Trial(0.03, "constant"),)) for grid in LONG]
    monkeypatch.setattr(sweep, "GRIDS", (*small, *long))
    monkeypatch.setattr(sweep, "SEEDS", (200,))
    store = spread.Store(tmp_path / sweep.FOLDER)
    missing, *others = dict.fromkeys(sweep.list_all_settings(backend))
    for setting in others:
        store.add(setting, record(setting.task, 0.5), {})
    page = tmp_path / "page.md"
    page.write_text("# Tuning\n\n<!-- sweep-prior -->\n\nold\n\n<!-- /sweep-prior -->\n\nend\n", encoding="utf-8")
    before = dict(os.environ)
    main(["sweep", "--backend", backend, "--workers", "1", "--results", str(tmp_path), "--page", str(page)])
    assert dict(os.environ) == before
    found = spread.Store(tmp_path / sweep.FOLDER).find(missing)
    assert found is not None
    text = page.read_text(encoding="utf-8")
    assert f"{found['final']['train']['loss']:.4g}" in text.partition("<!-- /sweep-prior -->")[0]
    assert "old" not in text
    assert text.index("\nend\n") < text.index("<!-- sweep-kappas -->") < text.index("<!-- sweep-long-prior -->")
    assert "noisy quadratic, 2 times as long, 4000 steps:" in text
    assert MISSING not in text
