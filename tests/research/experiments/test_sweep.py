"""The grids of VSGD's hyperparameters, and that the command does what is missing and fills a page."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

for package in ("keras", "scipy", "tqdm"):
    pytest.importorskip(package)

import keras  # noqa: E402

from experiments import spread, sweep  # noqa: E402
from experiments.__main__ import main  # noqa: E402
from experiments.comparison import ENTRANTS, Trial, find_entrant  # noqa: E402
from experiments.paper_report import MISSING  # noqa: E402
from vsgd import core  # noqa: E402


def test_grids_hold_the_default_and_what_the_optimizer_takes() -> None:
    defaults = core.VSGD.hyperparameters()
    for grid in sweep.GRIDS:
        values = [each for each, entrant in grid.entrants.items() if entrant == sweep.DEFAULT]
        assert values == [tuple(getattr(defaults, head) for head in grid.heads)]
        for each, entrant in grid.entrants.items():
            if entrant != sweep.DEFAULT:
                assert find_entrant(entrant).hyper == dict(zip(grid.heads, each, strict=True))
                find_entrant(entrant).make()
    tried = {trial.learning_rate for grid in sweep.GRIDS for trial in grid.trials}
    assert set(sweep.RATES) < tried < set(ENTRANTS["vsgd"].base.list_learning_rates(10))


def test_the_command_runs_what_is_missing_and_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of made-up runs, one is left to do.
    backend = keras.backend.backend()
    small = [grid._replace(tasks=("quadratic",), trials=(Trial(0.03, "cosine"),)) for grid in sweep.GRIDS[:2]]
    monkeypatch.setattr(sweep, "GRIDS", small)
    monkeypatch.setattr(sweep, "SEEDS", (200,))
    store = spread.Store(tmp_path / sweep.FOLDER)
    missing, *others = dict.fromkeys(sweep.list_all_settings(backend))
    for setting in others:
        store.add(setting, {"final": {split: {"loss": 0.5} for split in ("train", "validation")}}, {})
    page, before = tmp_path / "page.md", dict(os.environ)
    main(["sweep", "--backend", backend, "--workers", "1", "--results", str(tmp_path), "--page", str(page)])
    assert dict(os.environ) == before
    found = spread.Store(tmp_path / sweep.FOLDER).find(missing)
    text = page.read_text(encoding="utf-8")
    assert f"{found['final']['train']['loss']:.4g}" in text.partition("<!-- /sweep-prior -->")[0]
    assert MISSING not in text
