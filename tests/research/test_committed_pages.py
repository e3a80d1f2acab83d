"""Test that the commands write the committed pages from the committed records."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from research.scripts import need, need_study_data

need("keras", "matplotlib", "scipy", "tqdm")

import benchmarks.__main__  # noqa: E402
import experiments.__main__  # noqa: E402
from experiments import comparison, paper_report, spread, tasks  # noqa: E402
from reporting.pages import replace_section  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"


def read_plot(image: Path) -> Any:
    """Return the pixels of a PNG, or the coordinates of an SVG's curves."""
    if image.suffix == ".png":
        from matplotlib.image import imread

        return imread(image)
    curves = re.findall(r'<path d="([^"]+)" clip-path', image.read_text(encoding="utf-8"))
    return np.array([float(number) for curve in curves for number in re.findall(r"[\d.]+", curve)])


@pytest.mark.usefixtures("without_pyplot")
@pytest.mark.parametrize(
    ("name", "records", "program", "command", "sections"),
    [
        ("performance", "performance", benchmarks, "report", "torch|optax.*|keras-train-.*"),
        ("appendix", "results", experiments, "report", "paper|small-.*|longer-.*"),
        ("appendix", "results", experiments, "sweep", "sweep-.*"),
        ("appendix", "results", experiments, "recommended", "recommended|rates"),
    ],
)
def test_a_page_and_its_plots_are_written_from_their_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, records: str, program: Any, command: str, sections: str
) -> None:
    folder = shutil.copytree(DOCS / records, tmp_path / records, ignore=shutil.ignore_patterns("*.png", "*.svg"))
    committed, page = (DOCS / f"{name}.md").read_text(encoding="utf-8"), tmp_path / f"{name}.md"
    page.write_text(committed, encoding="utf-8")
    for section in re.findall(rf"<!-- /({sections}) -->", committed):
        replace_section(page, section, ["old"])
    monkeypatch.setattr(sys, "argv", ["python", command, "--results", str(folder), "--page", str(page)])
    program.__main__.main()
    assert page.read_text(encoding="utf-8") == committed
    for image in (*folder.glob("*.png"), *folder.glob("*.svg")):
        drawn, expected = read_plot(image), read_plot(DOCS / records / image.name)
        # Fonts and line widths differ between versions of matplotlib, but curves do not.
        assert drawn.shape == expected.shape
        assert abs(drawn - expected).mean() < 0.01 * expected.max()


@pytest.mark.usefixtures("without_pyplot")
def test_the_pages_of_the_study_are_written_from_its_records(tmp_path: Path) -> None:
    need("jax", "optax")
    need_study_data()
    from experiments.study import protocol, report
    from experiments.study.__main__ import PARTS

    folder = shutil.copytree(DOCS / "results" / "study", tmp_path / "results" / "study", ignore=shutil.ignore_patterns("*.svg"))
    names = ("results.md", "appendix.md")
    for name in names:
        page = Path(shutil.copy(DOCS / name, tmp_path))
        for section in re.findall(r"<!-- /(study-.*) -->", page.read_text(encoding="utf-8")):
            replace_section(page, section, ["old"])
    finds = {part: spread.Store(folder / part).find for part in PARTS}
    report.write_pages(finds, protocol.choose_settings(finds["selection"]), *(tmp_path / name for name in names), folder)
    for name in names:
        assert (tmp_path / name).read_text(encoding="utf-8") == (DOCS / name).read_text(encoding="utf-8")
    assert {path.name for path in folder.glob("*.svg")} == {path.name for path in (DOCS / "results" / "study").glob("*.svg")}


def test_without_records_every_cell_says_so(tmp_path: Path) -> None:
    page = tmp_path / "a" / "new" / "appendix.md"
    experiments.__main__.main(["report", "--results", str(tmp_path / "results"), "--page", str(page)])
    entrants, arms = len(comparison.ENTRANTS), len(comparison.ARMS)
    # A task has a verdict on each other entrant in each arm, a range for each entrant, a target, and rows of seven cells.
    cells_of_a_task = arms * (entrants - 1) + entrants + 1 + 7 * arms * entrants
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Appendix\n")
    assert "](../../results/small-curves.svg)" in text
    assert text.count(paper_report.MISSING) == len(tasks.TASKS) * cells_of_a_task
    assert text.count("0-0-0 / 0-0-0") == arms * (entrants - 1)
    assert len(re.findall(r"0 of 420 +\| 0 of 70", text)) == len(tasks.TASKS)
