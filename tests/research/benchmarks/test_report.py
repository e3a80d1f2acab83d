"""What the benchmarks' page says beyond the committed one, and which results go together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import measure
from reporting.pages import replace_section


def test_a_section_that_does_not_end_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "<!-- /torch -->\n\n<!-- torch -->\nold\n\nAfter.\n"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"^section 'torch' of .*page\.md begins with <!-- torch -->, but must end with <"):
        replace_section(page, "torch", ["new"])
    assert page.read_text() == text


def test_results_of_another_machine_are_not_mixed() -> None:
    merge = measure.merge_results
    old, same, other = (
        {"environment": {"versions": {"torch": version}}, "competitors": competitors}
        for version, competitors in (("2", {"a": 1, "b": 1}), ("2", {"b": 2, "c": 2}), ("3", {"b": 2, "c": 2}))
    )
    assert merge(None, same) == same
    assert merge(old, same)["competitors"] == {"a": 1, "b": 2, "c": 2}
    assert merge(old, other) == other


def test_the_accuracy_of_compact_state_is_reported(tmp_path: Path) -> None:
    for package in ("torch", "sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks.compact", "--seeds", "2", "--epochs", "1", "--page", str(page)]
    subprocess.run(command, cwd=Path(__file__).parents[3], check=True, capture_output=True, timeout=300)
    assert (tmp_path / "page" / "compact-state.png").stat().st_size > 10_000
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")][2:]
    means = [[float(cell.split("±")[0]) for cell in row.split("|")[2:-1]] for row in rows]
    for wide, compact, difference in zip(*means, strict=True):
        assert compact - wide == pytest.approx(difference, abs=0.06 * wide)  # of two digits each
