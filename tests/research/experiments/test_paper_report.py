"""The paper's table: means of what was run, and where nothing was, no number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import datasets, paper, paper_report

ALL = len(paper.EXPERIMENTS) * len(paper.COMPARED)


def record(experiment: str, optimizer: str, seed: int, accuracy: float, backend: str = "jax", **other: Any) -> dict[str, Any]:
    digest = other.pop("digest", datasets.SOURCES[paper.EXPERIMENTS[experiment].data].digest)
    steps = [500, 1000, 1500]
    curve = {
        "step": steps,
        "loss": [4.0, 2.0, 1.0 + seed],
        "accuracy": [0.1, 0.2, 0.3],
        "test_loss": [4.0, 3.0, 2.5],
        "test_accuracy": [0.01, 0.99, accuracy],  # the last one counts, not the best one
    }
    environment = {"cpu": "C", "gpu": "a GPU", "versions": {"keras": "3"}}
    return {
        "key": paper.make_settings(experiment, optimizer, seed, **other).make_key(backend, digest),
        "environment": environment,
        "curve": curve,
    }


def page_of(folder: Path, *every: dict[str, Any]) -> str:
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "paper.jsonl").write_text("".join(json.dumps(each) + "\n" for each in every))
    paper_report.write_page(folder / "results", folder / "results.md")
    return (folder / "results.md").read_text(encoding="utf-8")


def rows_of(page: str) -> dict[tuple[str, str], list[str]]:
    """The cells of each row, by the data set and the optimizer."""
    found, data = {}, ""
    for line in page.splitlines():
        if line.startswith("|") and "---" not in line:
            first, *cells = (cell.strip() for cell in line.split("|")[1:-1])
            if first.endswith("test accuracy, %"):
                data = first.split(",")[0]
            else:
                found[data, first] = cells
    return found


def test_without_runs_every_cell_says_so(tmp_path: Path) -> None:
    paper_report.write_page(tmp_path / "results", tmp_path / "docs" / "results.md")
    page = (tmp_path / "docs" / "results.md").read_text()
    assert page.startswith("# Results\n")
    rows = rows_of(page)
    assert len(rows) == 2 * len(paper.COMPARED)
    assert [cell for cells in rows.values() for cell in cells] == [paper_report.MISSING] * ALL


def test_cells_are_means_over_seeds_of_the_last_accuracy(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    every = [record("cifar100-vgg19", "vsgd", seed, accuracy) for seed, accuracy in ((0, 0.60), (1, 0.62), (2, 0.64))]
    every.append(record("tiny-imagenet-convmixer", "adam", 0, 0.5))
    rows = rows_of(page_of(tmp_path, *every))
    missing = paper_report.MISSING
    # The sample standard deviation of 60, 62 and 64 is 2.
    assert rows.pop(("CIFAR-100", "VSGD")) == [missing, "62.00 ± 2.00 (3 seeds)", missing, missing]
    assert rows.pop(("Tiny ImageNet-200", "Adam")) == [missing, missing, missing, "50.00 (1 seed)"]
    assert {cell for cells in rows.values() for cell in cells} == {missing}


def test_no_cell_is_filled_from_other_settings_or_other_data(tmp_path: Path) -> None:
    page = page_of(
        tmp_path,
        record("cifar100-vgg16", "vsgd", 0, 0.6, iterations=500),
        record("cifar100-vgg16", "vsgd", 0, 0.6, learning_rate=0.01),
        record("cifar100-vgg16", "vsgd", 0, 0.6, digest="of a tiny archive"),
        record("cifar100-vgg16", "lion", 0, 0.6),
    )
    assert page.count(paper_report.MISSING) == ALL
    assert "60.00" not in page


def test_backends_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name, optimizer = "cifar100-resnext", "sgd"
    page = page_of(tmp_path, record(name, optimizer, 0, 0.6), record(name, optimizer, 1, 0.7, backend="torch"))
    assert page.count("60.00 (1 seed)") == page.count("70.00 (1 seed)") == 1
    assert "On Keras' jax backend, a GPU with keras 3:" in page
    assert page.index("jax backend") < page.index("60.00") < page.index("torch backend") < page.index("70.00")


@pytest.mark.usefixtures("without_pyplot")
def test_curves_are_drawn_of_what_was_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    page = page_of(tmp_path, *(record("cifar100-vgg16", name, seed, 0.6) for name in ("vsgd", "adam") for seed in (0, 1)))
    assert [path.name for path in (tmp_path / "results").glob("*.png")] == ["paper-cifar100-jax.png"]
    assert "](results/paper-cifar100-jax.png)" in page
    assert imread(tmp_path / "results" / "paper-cifar100-jax.png").std() > 0.05


def test_the_page_keeps_what_stands_about_the_section(tmp_path: Path) -> None:
    (tmp_path / "results.md").write_text("# Results\n\nBefore.\n\n<!-- paper -->\nold\n<!-- /paper -->\n\nAfter.\n")
    for _ in range(2):
        page = page_of(tmp_path)
        assert page.startswith("# Results\n\nBefore.\n\n<!-- paper -->\n\n| CIFAR-100")
        assert page.endswith("\n<!-- /paper -->\n\nAfter.\n")
        assert "old" not in page
