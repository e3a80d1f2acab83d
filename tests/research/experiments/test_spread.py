"""Runs over processes: what is finished is kept, and not repeated, when all is killed."""

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

from research.small_comparison import RUNS  # noqa: E402

from experiments import records, spread  # noqa: E402
from experiments.comparison import Setting, Trial  # noqa: E402

ROOT = Path(__file__).parents[3]


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests" / "research" / "small_comparison.py"), str(folder), keras.backend.backend()]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


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
    workers = children(process.pid)
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
    before = records.read_jsonl(path)
    assert 2 <= len(before) < RUNS
    path.write_bytes(kept + kept[:50])  # as if one had been killed as it wrote

    again = start(tmp_path)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert path.read_bytes().startswith(kept)
    after = records.read_jsonl(path)
    assert len(after) == len({json.dumps(each["key"]) for each in after}) == RUNS
    # Nothing is left to do: no process is started, and nothing written.
    whole = path.read_bytes()
    third = start(tmp_path)
    output, _ = third.communicate(timeout=60)
    assert third.returncode == 0, output
    assert path.read_bytes() == whole
    environments = records.read_jsonl(tmp_path / "environments.jsonl")
    assert {each["environment"] for each in after} == {each["key"]["environment"] for each in environments}
    assert environments[0]["versions"]["keras"] == keras.__version__


def test_records_are_short(tmp_path: Path) -> None:
    store = spread.Store(tmp_path)
    setting = Setting("quadratic", "vsgd", Trial(0.01, "cosine"), 0, "jax")
    found = {"curve": [1 / 3, None, 2.0], "losses": [123456.789], "final": {"test": {"loss": 1e-9 / 3}}, "seconds": 2 / 3}
    store.add(setting, spread.round_numbers(found), {"cpu": "a CPU"})
    assert store.find(setting) == spread.Store(tmp_path).find(setting)
    record = store.find(setting)
    assert record["curve"] == [0.3333, None, 2.0]
    assert record["final"] == {"test": {"loss": 3.333e-10}}
    assert store.find(setting._replace(seed=1)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["cifar"], ["vsgd"], 1), "^task is 'cifar', but must be one of"),
        ((["quadratic"], ["adam"], 1), "^entrant is 'adam', but must be one of"),
        ((["quadratic"], ["vsgd"], 0), "^workers is 0, but must be at least 1$"),
    ],
)
def test_what_is_not_there_is_named_before_anything_runs(arguments: tuple, message: str, tmp_path: Path) -> None:
    names, entrants, workers = arguments
    with pytest.raises(ValueError, match=message):
        spread.run_comparison(names, entrants, spread.Store(tmp_path), workers, "jax")
    assert not list(tmp_path.iterdir())
