"""The benchmarks' results, as tables, pages and plots."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reporting.examples import load_example
from reporting.pages import format_table, replace_section

ROOT = Path(__file__).parents[3]


def environment(**versions: str) -> dict[str, Any]:
    return {"cpu": "C", "processors": 2, "threads": 2, "gpu": None, "system": "Linux", "versions": versions}


def competitor(seconds: list[float | None], against: list[float], state: float = 8.0) -> dict[str, Any]:
    moves = {"traffic_bytes": int(12 + 2 * state) * 100}
    return {"seconds": seconds, "against": {"base": against}, "state_bytes_per_parameter": state, **moves}


def results(cells: dict[str, Any]) -> dict[str, Any]:
    return {"suite": "torch", "title": "PyTorch", "device": "cpu", "baselines": ["base"], "cells": cells}


def cell(slow: list[float | None], **size: int) -> dict[str, Any]:
    base = [0.001, 0.002, 0.005, 0.002]
    competitors = {"base": competitor(base, base), "slow": competitor(slow, base, 12.0)}
    # 50 GB/s, but for one slow round.
    memory = {"bytes": 100_000_000, "seconds": [0.002, 0.002, 0.008, None]}
    times = {"environment": environment(torch="2"), "memory": memory, "competitors": competitors}
    return {"tensors": 4, "parameters": 100, **size, "times": times}


SLOW = [0.002, 0.003, None, 0.008]


def test_the_tables(module: Callable[[str], Any]) -> None:
    measured = cell(SLOW)
    measured["probes"] = {
        "environment": environment(torch="2"),
        "memory": "as told",
        "competitors": {"slow": {"first_step_seconds": 1.5, "transient_bytes": 64_000_000}},
    }
    told = results({"many": measured, "conv": cell([0.002] * 4)})
    told["imports"] = {"environment": environment(torch="2"), "seconds": {"vsgd.torch": 0.01}}
    text = module("report").format_tables(told)
    assert text.startswith("`python -m benchmarks run torch`, on 2 processors (C), Linux, 2 threads; torch 2.\n")
    assert "Memory moved 50 GB/s on conv, 50 GB/s on many." in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["time / base", "conv", "many"] in lines
    assert ["base", "1, 2 ms", "1, 2 ms"] in lines
    # Of conv the ratios are 2, 1, 0.4, 1; of many 2, 1.5, 4.
    assert ["slow", "1.00 (0.85 to 1.25), 2 ms", "2.00 (1.75 to 3.00), 3 ms"] in lines
    assert ["", "state, bytes / parameter", "peak of a step, MB: many", "first step, s: many"] in lines
    assert ["slow", "12.0", "64", "1.5"] in lines
    assert "`vsgd.torch` 0.01 s" in text


def test_the_page_keeps_what_stands_about_the_tables(module: Callable[[str], Any], tmp_path: Path) -> None:
    folder, page = tmp_path / "performance", tmp_path / "performance.md"
    folder.mkdir()
    page.write_text("# Performance\n\nBefore.\n\n<!-- torch -->\nold\n<!-- /torch -->\n\nAfter.\n")
    (folder / "torch.json").write_text(json.dumps(results({"many": cell(SLOW)})))
    (folder / "optax.json").write_text(json.dumps(results({"many": cell(SLOW)})))
    for _ in range(2):
        module("report").write_page(folder, page)
        text = page.read_text()
        assert text.startswith("# Performance\n\nBefore.\n\n<!-- torch -->\n\n### PyTorch\n")
        assert "\n<!-- /torch -->\n\nAfter.\n\n<!-- optax -->\n" in text
        assert "old" not in text
        assert text.count("2.00 (1.75 to 3.00)") == 2


@pytest.mark.usefixtures("without_pyplot")
def test_sweeps_are_drawn(module: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    swept = {f"tensors={number}": cell(SLOW, tensors=number) for number in (10, 1, 3)}
    (tmp_path / "torch.json").write_text(json.dumps(results({**swept, "parameters=100": cell(SLOW)})))
    module("report").write_page(tmp_path, tmp_path / "page.md")
    # One point is no curve.
    assert [path.name for path in tmp_path.glob("*.png")] == ["torch-tensors.png"]
    assert "](torch-tensors.png)" in (tmp_path / "page.md").read_text()
    assert imread(tmp_path / "torch-tensors.png").std() > 0.05


def test_the_page_and_its_images_may_lie_apart(module: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder, page = tmp_path / "results", tmp_path / "new" / "pages" / "page.md"
    folder.mkdir()
    swept = {f"tensors={number}": cell(SLOW, tensors=number) for number in (1, 3)}
    (folder / "torch.json").write_text(json.dumps(results(swept)))
    module("report").write_page(folder, page)
    assert "](../../results/torch-tensors.png)" in page.read_text()


def test_a_section_that_does_not_end_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "<!-- /torch -->\n\n<!-- torch -->\nold\n\nAfter.\n"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"^section 'torch' of .*page\.md begins with <!-- torch -->, but must end with <"):
        replace_section(page, "torch", ["new"])
    assert page.read_text() == text


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    rows = [["a", "1.5"], ["long name", "10"]]
    left = ["| name      | x   |", "| --------- | --- |", "| a         | 1.5 |", "| long name | 10  |"]
    right = ["| name      |   x |", "| --------- | --: |", "| a         | 1.5 |", "| long name |  10 |"]
    assert format_table(["name", "x"], rows).splitlines() == left
    assert format_table(["name", "x"], rows, left=1).splitlines() == right


def test_a_new_page_is_titled_after_its_file(tmp_path: Path) -> None:
    page = tmp_path / "new" / "performance.md"
    replace_section(page, "torch", ["Text."])
    assert page.read_text() == "# Performance\n\n<!-- torch -->\n\nText.\n\n<!-- /torch -->\n"


def test_the_floor_is_traffic_over_bandwidth(module: Callable[[str], Any]) -> None:
    # 36 bytes of each of 100 parameters, at 50 GB/s.
    assert module("plots").compute_floor(cell(SLOW)["times"], "slow") == pytest.approx(3600 / 5e10)


def test_results_of_another_machine_are_not_mixed(module: Callable[[str], Any]) -> None:
    merge = module("measure").merge_results
    old = {"environment": environment(torch="2"), "competitors": {"a": 1, "b": 1}}
    same = {"environment": environment(torch="2"), "competitors": {"b": 2, "c": 2}}
    other = {"environment": environment(torch="3"), "competitors": {"b": 2, "c": 2}}
    assert merge(None, same) == same
    assert merge(old, same)["competitors"] == {"a": 1, "b": 2, "c": 2}
    assert merge(old, other) == other


def test_the_quickstart_is_loaded_and_leaves_no_module() -> None:
    for package in ("torch", "sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    assert "VSGD" in load_example("quickstart").OPTIMIZERS
    assert "quickstart" not in sys.modules


@pytest.mark.usefixtures("without_pyplot")
def test_noise_estimates_are_drawn(module: Callable[[str], Any], tmp_path: Path) -> None:
    for package in ("torch", "matplotlib"):
        pytest.importorskip(package)
    estimates = {name: [1.0, 0.5, 0.2] for name in ("float32", "bfloat16", "to the nearest")}
    module("compact").draw_estimates(estimates, tmp_path / "estimates.png")
    assert (tmp_path / "estimates.png").stat().st_size > 10_000


def test_the_accuracy_of_compact_state_is_told(tmp_path: Path) -> None:
    for package in ("torch", "sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compact -->\nold\n<!-- /compact -->\nafter\n")
    command = [sys.executable, "-m", "benchmarks.compact", "--seeds", "2", "--epochs", "1", "--page", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert (tmp_path / "page" / "compact-state.png").exists()
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 3
    means = [[float(cell.split("±")[0]) for cell in row.split("|")[2:-1]] for row in rows]
    for wide, compact, difference in zip(*means, strict=True):
        assert compact - wide == pytest.approx(difference, abs=0.06 * wide)  # of two digits each
