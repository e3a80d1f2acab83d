"""Runs over processes: what is finished is kept, and not repeated, when all is killed; and the sweep, which is made of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

keras = pytest.importorskip("keras")
for package in ("scipy", "tqdm"):
    pytest.importorskip(package)

from research import small_comparison  # noqa: E402

from experiments import records, spread, sweep  # noqa: E402
from experiments.__main__ import main  # noqa: E402
from experiments.comparison import ENTRANTS, Setting, Trial, find_entrant  # noqa: E402
from experiments.paper_report import MISSING  # noqa: E402
from vsgd import core  # noqa: E402


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, small_comparison.__file__, str(folder), keras.backend.backend()]
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")


def finish(folder: Path) -> None:
    process = start(folder)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task").exists(), reason="without /proc, nothing tells the processes")
def test_after_a_kill_finished_runs_stay_and_the_others_follow(tmp_path: Path) -> None:
    path = tmp_path / "quadratic.jsonl"
    process = start(tmp_path)
    wait_until(lambda: len(records.read_jsonl(path)) >= 2)
    workers = list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    process.kill()
    process.wait()
    try:
        # Workers end by themselves.
        wait_until(lambda: not any(map(alive, workers)), seconds=20)
    finally:
        for worker in filter(alive, workers):
            os.kill(worker, signal.SIGKILL)
        process.communicate()
    kept = path.read_bytes()
    assert 2 <= len(records.read_jsonl(path)) < small_comparison.RUNS
    path.write_bytes(kept + kept[:50])  # as if one had been killed as it wrote

    finish(tmp_path)
    whole = path.read_bytes()
    assert whole.startswith(kept)
    after = records.read_jsonl(path)
    assert len(after) == len({json.dumps(each["key"]) for each in after}) == small_comparison.RUNS
    (environment,) = records.read_jsonl(tmp_path / "environments.jsonl")
    assert {each["environment"] for each in after} == {environment["key"]["environment"]}
    assert environment["versions"]["keras"] == keras.__version__
    # Nothing is left to do, and nothing is written.
    finish(tmp_path)
    assert path.read_bytes() == whole


def test_records_are_short(tmp_path: Path) -> None:
    store = spread.Store(tmp_path)
    setting = Setting("quadratic", "vsgd", Trial(0.01, "cosine"), 0, "jax")
    found = {"curve": [1 / 3, None, 2.0], "final": {"test": {"loss": 1e-9 / 3}}}
    store.add(setting, spread.round_numbers(found), {"cpu": "a CPU"})
    record = spread.Store(tmp_path).find(setting)
    assert {name: record[name] for name in found} == {"curve": [0.3333, None, 2.0], "final": {"test": {"loss": 3.333e-10}}}
    assert store.find(setting._replace(seed=1)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "cifar"], "task is 'cifar', but must be one of quadratic, mnist1d-mlp, "),
        (["--tasks", "quadratic@0"], "task is 'quadratic@0', but after '@' it must have a positive integer"),
        (["--tasks", "quadratic@x"], "task is 'quadratic@x', but after '@' it must have a positive integer"),
        (["--entrants", "adam"], "entrant is 'adam', but must be one of vsgd, vsgd-kappas, "),
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


# The sweep's


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
