"""Test runs over processes, where a kill preserves finished runs and none is repeated, and the sweep, which uses such runs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from research.scripts import need

keras = pytest.importorskip("keras")
need("scipy", "tqdm")

from drivers.processes import run_python  # noqa: E402
from research import small_comparison  # noqa: E402

from experiments import records, spread, sweep  # noqa: E402
from experiments.__main__ import main  # noqa: E402
from experiments.comparison import Trial  # noqa: E402
from experiments.paper_report import MISSING  # noqa: E402


def finish(folder: Path) -> None:
    done = run_python(keras.backend.backend(), "-m", "research.small_comparison", str(folder))
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this platform has no SIGKILL")
def test_after_a_kill_finished_runs_stay_and_the_others_follow(tmp_path: Path) -> None:
    path = tmp_path / "quadratic.jsonl"
    # The call ends when the workers have ended, because they hold its output.
    done = run_python(keras.backend.backend(), "-m", "research.small_comparison", str(tmp_path), "--die-after", "2")
    assert done.returncode == -signal.SIGKILL, done.stdout
    kept = path.read_bytes()
    assert 2 <= len(records.read_jsonl(path)) < small_comparison.RUNS
    path.write_bytes(kept + kept[:50])  # as if a process had been killed while writing

    finish(tmp_path)
    whole = path.read_bytes()
    assert whole.startswith(kept)
    after = records.read_jsonl(path)
    assert len(after) == len({json.dumps(each["key"]) for each in after}) == small_comparison.RUNS
    (environment,) = records.read_jsonl(tmp_path / "environments.jsonl")
    assert {each["environment"] for each in after} == {environment["key"]["environment"]}
    assert environment["versions"]["keras"] == keras.__version__
    # Nothing is left to do, so nothing is written.
    finish(tmp_path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "cifar"], "task is 'cifar', but must be one of quadratic, mnist1d-mlp, "),
        (["--tasks", "quadratic@-1"], "task is 'quadratic@-1', but after '@' it must have an integer of at least 0"),
        (["--tasks", "quadratic@x"], "task is 'quadratic@x', but after '@' it must have an integer of at least 0"),
        (["--entrants", "adam"], "entrant is 'adam', but must be one of vsgd, vsgd-kappas, "),
        (
            ["--entrants", "vsgd:kappa1"],
            "entrant is 'vsgd:kappa1', but after ':' it must have NAME=NUMBER, separated by commas",
        ),
        (["--workers", "0"], "workers is 0, but must be at least 1"),
    ],
)
def test_what_is_not_there_is_named_before_anything_runs(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--results", str(tmp_path), *options])
    assert f"error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# The sweep


def test_the_command_runs_what_is_missing_and_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # All runs but one are made up, so one is left to do.
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
