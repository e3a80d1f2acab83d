"""The README's tables say what the pages and records behind them say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from research.scripts import loaded

for package in ("matplotlib", "scipy", "tqdm"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def readme() -> Iterator[ModuleType]:
    with loaded(ROOT / "docs" / "readme.py") as module:
        yield module


def test_the_readme_is_as_its_script_writes_it(readme: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", page)
    readme.write_tables(page)
    assert page.read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8")
    # All sections are there, where the script would only have added what is missing.
    assert re.findall(r"<!-- (\w+) -->", page.read_text(encoding="utf-8")) == ["agreement", "speed", "results"]


def test_the_worst_runner_speaks_for_its_framework(readme: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "agreement.md"
    heads = ["runner", *readme.COLUMNS]
    rows = [
        ["bound", "1e-10", "1e-04", "1e-09", "1e-05"],
        ["numpy", "1.5e-12", "9.6e-07", "reference", "6.1e-07"],
        ["torch-loop", "1.0e-12", "9.6e-07", "", "6.3e-07"],
        ["torch-fused", "8.9e-13 (1 of 5)", "2.0e-06", "1.4e-15", "0.0e+00"],
        ["core-torch", "1.0e-02", "1.0e-02", "1.0e-02", "1.0e-02"],
    ]
    lines = [heads, ["---"] * len(heads), *rows]
    page.write_text("# Agreement\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
    told = {
        cells[0]: cells[1:]
        for cells in (re.split(r" +\| +", line.strip("| ")) for line in readme.format_agreement(page).splitlines())
    }
    assert told["bound of the tests"] == ["1e-10", "1e-04", "1e-09", "1e-05"]
    assert told["NumPy"] == ["2e-12", "1e-06", "reference", "6e-07"]
    assert told["PyTorch"] == ["1e-12", "2e-06", "1e-15", "6e-07"]
    assert "JAX, optax" not in told
