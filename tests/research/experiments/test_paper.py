"""The paper's settings, as the authors' configuration has them, and its table: means of what was run with them, alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from experiments import datasets, paper, paper_report

VGG16 = "cifar100-vgg16"


def test_the_settings() -> None:
    cifar100, tiny = (30_000, 256, 10_000), (60_000, 128, 20_000)
    expected = {
        f"{data}-{model}": each for data, each in (("cifar100", cifar100), ("tiny-imagenet", tiny)) for model in paper.MODELS
    }
    expected |= {"cifar100-resnext": (30_000, 128, 10_000), "tiny-imagenet-resnext": (60_000, 64, 20_000)}
    found = {name: (each.iterations, each.batch_size, each.halve_every) for name, each in paper.EXPERIMENTS.items()}
    assert found == expected
    rates = {name: paper.make_settings(VGG16, name).learning_rate for name in paper.COMPARED}
    assert rates == {"vsgd": 0.1, "constant-vsgd": 0.1, "adam": 0.001, "adamw": 0.001, "sgd": 0.1}
    assert paper.make_settings(VGG16, "sgd").hyper == {"momentum": 0.9}
    # One that the paper does not compare runs at its own default.
    assert paper.make_settings(VGG16, "lion").learning_rate == 0.001


def test_what_is_given_replaces_the_papers_settings() -> None:
    found = paper.make_settings(VGG16, "sgd", 7, iterations=20, learning_rate=None, batch_size=4, hyper={"weight_decay": 0.1})
    assert (found.iterations, found.evaluate_every, found.batch_size) == (20, 20, 4)
    assert (found.learning_rate, found.seed, found.halve_every) == (0.1, 7, 10_000)
    assert found.hyper == {"momentum": 0.9, "weight_decay": 0.1}


def record(experiment: str, optimizer: str, seed: int, accuracy: float, backend: str = "jax", **other: Any) -> dict[str, Any]:
    digest = other.pop("digest", datasets.SOURCES[paper.EXPERIMENTS[experiment].data].digest)
    # The last accuracy counts, not the best one.
    curve = {"step": [500, 1000], "loss": [4.0, 1.0 + seed], "test_accuracy": [0.99, accuracy]}
    key = paper.make_settings(experiment, optimizer, seed, **other).make_key(backend, digest)
    return {"key": key, "environment": {"cpu": "C", "gpu": "a GPU", "versions": {"keras": "3"}}, "curve": curve}


def page_of(folder: Path, every: Iterable[dict[str, Any]]) -> str:
    (folder / "paper.jsonl").write_text("".join(json.dumps(each) + "\n" for each in every))
    paper_report.write_page(folder, folder / "results.md")
    return (folder / "results.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("without_pyplot")
def test_cells_are_means_over_seeds_of_the_last_accuracy_and_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    every = [(name, optimizer) for name in paper.EXPERIMENTS for optimizer in paper.COMPARED]
    page = page_of(tmp_path, (record(*which, seed, 0.6 + 0.02 * seed) for which in every for seed in range(3)))
    assert "On Keras' jax backend, a GPU with keras 3:" in page
    # The sample standard deviation of 60, 62 and 64 is 2.
    assert page.count("62.00 ± 2.00 (3 seeds)") == len(every)
    images = [f"paper-{data}-jax.png" for data in datasets.SOURCES]
    assert [f"]({path.name})" in page for path in sorted(tmp_path.glob("*.png"))] == [True] * len(images)


def test_no_cell_is_filled_from_other_settings_or_other_data(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [{"iterations": 500}, {"learning_rate": 0.01}, {"batch_size": 128}]
    others += [{"hyper": {"weight_decay": 0.1}}, {"digest": datasets.SOURCES["tiny-imagenet"].digest}]
    every = [record(VGG16, "vsgd", 0, 0.6, **other) for other in others]
    page = page_of(tmp_path, [*every, record(VGG16, "lion", 0, 0.6)])
    assert page.count(paper_report.MISSING) == len(paper.EXPERIMENTS) * len(paper.COMPARED)
    assert "60.00" not in page


def test_backends_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = page_of(tmp_path, [record(VGG16, "sgd", 0, 0.6), record(VGG16, "sgd", 1, 0.7, backend="torch")])
    assert page.count("60.00 (1 seed)") == page.count("70.00 (1 seed)") == 1
    assert page.index("jax backend") < page.index("60.00") < page.index("torch backend") < page.index("70.00")
