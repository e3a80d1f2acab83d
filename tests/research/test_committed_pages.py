"""The committed pages are what the commands write from the committed records."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

for package in ("keras", "matplotlib", "scipy", "tqdm"):
    pytest.importorskip(package)

from benchmarks import report  # noqa: E402
from experiments import comparison, paper, paper_report, tasks  # noqa: E402
from experiments.__main__ import main  # noqa: E402
from reporting.pages import replace_section  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"


def write_performance(folder: Path, page: Path) -> None:
    report.write_page(folder / "performance", page)


def write_results(folder: Path, page: Path) -> None:
    main(["report", "--results", str(folder / "results"), "--page", str(page)])


def write_tuning(folder: Path, page: Path) -> None:
    main(["sweep", "--results", str(folder / "results"), "--page", str(page)])


@pytest.mark.usefixtures("without_pyplot")
@pytest.mark.parametrize(
    ("name", "records", "write", "sections"),
    [
        ("performance", "performance", write_performance, "torch|optax|keras-train-.*"),
        ("results", "results", write_results, ".*"),
        ("tuning", "results", write_tuning, "sweep-.*"),
    ],
)
def test_a_page_and_its_plots_are_written_from_their_records(
    tmp_path: Path, name: str, records: str, write: Callable[[Path, Path], None], sections: str
) -> None:
    from matplotlib.image import imread

    shutil.copytree(DOCS / records, tmp_path / records, ignore=shutil.ignore_patterns("*.png"))
    committed = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    page = tmp_path / f"{name}.md"
    page.write_text(committed, encoding="utf-8")
    for section in re.findall(rf"<!-- /({sections}) -->", committed):
        replace_section(page, section, ["old"])
    write(tmp_path, page)
    # The benchmarks were recorded before this module was renamed.
    written = page.read_text(encoding="utf-8").replace("vsgd.backends.torch_fused", "vsgd.backends.torch.fused_cpu")
    assert written == committed
    for image in (tmp_path / records).glob("*.png"):
        drawn, expected = imread(image), imread(DOCS / records / image.name)
        # Fonts and widths of lines differ between versions of matplotlib, the curves don't.
        assert drawn.shape == expected.shape
        assert abs(drawn - expected).mean() < 0.01


def test_without_records_every_cell_says_so(tmp_path: Path) -> None:
    page = tmp_path / "a" / "new" / "results.md"
    write_results(tmp_path, page)
    paper_cells = len(paper.EXPERIMENTS) * len(paper.COMPARED)
    entrants, arms = len(comparison.ENTRANTS), len(comparison.ARMS)
    # A task has a verdict on each other entrant in each arm, a range for each entrant, a target, and rows of seven cells.
    cells_of_a_task = arms * (entrants - 1) + entrants + 1 + 7 * arms * entrants
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Results\n")
    assert "](../../results/small-curves.png)" in text
    assert text.count(paper_report.MISSING) == paper_cells + len(tasks.TASKS) * cells_of_a_task
    assert text.count("0-0-0 / 0-0-0") == arms * (entrants - 1)
    assert len(re.findall(r"0 of 420 +\| 0 of 70", text)) == len(tasks.TASKS)
