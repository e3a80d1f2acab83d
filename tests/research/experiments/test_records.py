"""Test that records of runs stay whole when a process is killed, and are found by what identifies the run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import records

KEY = {"task": "digits", "learning_rate": 0.1, "seed": 3, "hyper": {"kappa1": 0.6}}
REVERSED = dict(reversed(KEY.items()))


def test_a_run_has_one_record_that_is_found_again_by_its_key_in_whatever_order(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "runs.jsonl"
    written = records.Records(path).append(KEY, loss=[0.1, math.inf], note="é")
    read = records.Records(path)
    assert REVERSED in read
    assert {**KEY, "seed": 4} not in read
    assert read[KEY] == written == {"key": KEY, "loss": [0.1, math.inf], "note": "é"}
    with pytest.raises(ValueError, match="but must be of a run that has no record in"):
        read.append(REVERSED)
    assert len(path.read_text().splitlines()) == len(read) == 1


@pytest.mark.parametrize("torn", ['{"key":{"task"', '{"key":{"task":"other"}}'])
def test_a_line_that_was_cut_off_is_no_record_and_spoils_none(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "runs.jsonl"
    records.Records(path).append(KEY)
    with path.open("a") as file:
        file.write(torn)
    finished = records.Records(path)
    assert [each["key"] for each in finished] == [KEY]
    finished.append({**KEY, "seed": 4})
    assert [json.loads(line)["key"]["seed"] for line in path.read_text().splitlines()] == [3, 4]


def test_several_processes_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    script = (
        "import sys; from pathlib import Path; from experiments import records\n"
        "for seed in range(50):\n"
        "    records.Records(Path(sys.argv[1])).append({'by': sys.argv[2], 'seed': seed}, filler='x' * 20_000)"
    )
    commands = ([sys.executable, "-c", script, str(path), name] for name in ("a", "b"))
    every = [subprocess.Popen(command, cwd=Path(__file__).parents[3]) for command in commands]
    assert [process.wait(timeout=120) for process in every] == [0, 0]
    found = {(each["key"]["by"], each["key"]["seed"]) for each in records.read_jsonl(path)}
    assert found == {(name, seed) for name in ("a", "b") for seed in range(50)}


def test_a_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    path = tmp_path / "run" / "steps.jsonl"
    with records.Steps(path) as steps:
        for step in range(1, 8):
            steps.write(step, loss=step / 3)
            assert records.read_jsonl(path)[-1] == {"step": step, "loss": step / 3}  # at once, not when the file is closed
    with path.open("a") as file:
        file.write('{"step":8,"lo')
    with records.Steps(path, after=5) as steps:
        steps.write(6, loss=0.5)
    assert [each["step"] for each in records.read_jsonl(path)] == [1, 2, 3, 4, 5, 6]
    assert records.read_jsonl(path)[-1]["loss"] == 0.5
