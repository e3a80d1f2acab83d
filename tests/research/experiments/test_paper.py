"""Test the paper's experiments: their settings, and runs from the command line to the table, on tiny archives."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from research import paper_archives

pytest.importorskip("keras")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

import keras

from experiments import comparison, datasets, paper, paper_report, records, tasks
from experiments.__main__ import main

BACKEND = keras.backend.backend()
# Backends that compile steps run each kind of network and each data set only once, because compiling takes long.
RUNS = list(paper.EXPERIMENTS) if BACKEND == "torch" else ["cifar100-vgg16", "cifar100-resnext", "tiny-imagenet-convmixer"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with both archives."""
    folder = tmp_path_factory.mktemp("archives")
    paper_archives.cifar100(folder, test=2)
    paper_archives.tiny_imagenet(folder, test=2)
    return folder


def options(archives: Path, folder: Path) -> list[str]:
    return ["--data-dir", str(archives), "--results", str(folder / "results"), "--output", str(folder / "runs"), "--quiet"]


def run_of(archives: Path, folder: Path, experiment: str, optimizer: str, *other: str) -> list[str]:
    return ["run", experiment, "--optimizer", optimizer, "--batch-size", "2", *other, *options(archives, folder)]


@pytest.mark.parametrize(("experiment", "optimizer"), list(zip(RUNS, cycle(paper.COMPARED), strict=False)))
def test_four_steps_of_each_and_once_only(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], experiment: str, optimizer: str
) -> None:
    command = run_of(archives, tmp_path, experiment, optimizer, "--iterations", "4", "--evaluate-every", "2", "--seed", "3")
    # Keras writes with TensorFlow, which this test does not load together with another backend.
    main([*command, "--tensorboard"] if BACKEND == "tensorflow" else command)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{experiment}-{optimizer}-{BACKEND}-seed3-")
    assert {path.name for path in folder.iterdir()} - {"tensorboard"} == {"config.json", "steps.jsonl"}
    events = {path.parent.name for path in folder.rglob("events.out.tfevents.*")}
    assert events == ({"train", "validation"} if BACKEND == "tensorflow" else set())
    lines = records.read_jsonl(folder / "steps.jsonl")
    assert [sorted(each) for each in lines] == 2 * (
        2 * [["accuracy", "loss", "step"]] + [["step", "test_accuracy", "test_loss"]]
    )
    steps, tests = ([each for each in lines if name in each] for name in ("loss", "test_loss"))
    # At first, the loss is that of guessing.
    classes = 100 if experiment.startswith("cifar") else 200
    assert 0.7 * math.log(classes) < steps[0]["loss"] < 2 * math.log(classes)
    (record,) = records.read_jsonl(tmp_path / "results" / "paper.jsonl")
    config = json.loads((folder / "config.json").read_text())
    assert {name: record[name] for name in config} == config
    assert record["environment"]["versions"]["keras"] == keras.__version__
    assert record["key"]["seed"] == 3
    assert record["optimizer"]["learning_rate"]["config"]["initial_learning_rate"] == record["key"]["learning_rate"]
    curve = {name: [(one[name] + other[name]) / 2 for one, other in (steps[:2], steps[2:])] for name in ("loss", "accuracy")}
    curve |= {name: [each[name] for each in tests] for name in ("step", "test_loss", "test_accuracy")}
    assert record["curve"] == {name: pytest.approx(values, rel=1e-5) for name, values in curve.items()}
    what = f"{experiment}, {optimizer}, seed 3"
    assert capsys.readouterr().out == f"{what}\n{what}: test accuracy {100 * tests[1]['test_accuracy']:.2f} %\n"
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    main(command)
    assert capsys.readouterr().out == f"{what}: already finished\n"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == written


def test_the_table_has_no_number_of_tiny_archives(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command `paper` finishes the missing runs of those given, and reports."""
    # The settings are the paper's except for the length; with the published data, the results would be in the table.
    quick = paper.Experiment("cifar100", "convmixer", batch_size=2, iterations=1, halve_every=1)
    monkeypatch.setitem(paper.EXPERIMENTS, "cifar100-convmixer", quick)
    monkeypatch.setattr(paper, "COMPARED", ("adam", "adamw"))
    page = tmp_path / "results.md"
    main(run_of(archives, tmp_path, "cifar100-convmixer", "adamw"))
    command = ["paper", "--experiments", "cifar100-convmixer", "--seeds", "1", "--page", str(page)]
    main([*command, *options(archives, tmp_path)])
    assert "cifar100-convmixer, adamw, seed 0: already finished" in capsys.readouterr().out
    found = records.read_jsonl(tmp_path / "results" / "paper.jsonl")
    assert sorted(each["key"]["optimizer"] for each in found) == sorted(paper.COMPARED)
    # The page has only the authors' table.
    (table,) = re.findall(r"^\| CIFAR.*(?:\n\|.*)+", page.read_text(), flags=re.MULTILINE)
    assert "the authors' test accuracy" in table
    assert len(table.splitlines()) == 2 + len(paper_report.PUBLISHED)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cifar10-vgg16", "experiment is 'cifar10-vgg16', but must be one of cifar100-vgg16, cifar100-vgg19, "),
        ("cifar100-vgg16 --optimizer adm", "optimizer is 'adm', but must be one of vsgd, constant-vsgd, adam, "),
        ("cifar100-vgg16 --batch-size 99", "batch_size is 99, but must be at most 12, the number of training images"),
        ("cifar100-vgg16 --batch-size 0", "batch_size is 0, but must be finite and at least 1"),
        ("cifar100-vgg16 --iterations 700", "iterations is 700, but must be a multiple of evaluate_every, 500"),
        ("cifar100-vgg16 --seed -1", "seed is -1, but must be finite and at least 0"),
        ("cifar100-vgg16 --learning-rate -1", "learning_rate is -1.0, but must be finite and at least 0"),
        ("cifar100-vgg16 --learning-rate nan", "learning_rate is nan, but must be finite and at least 0"),
        ("tiny-imagenet-vgg16 --data-dir /absent", "--data-dir is /absent, but must be a folder with tiny-imagenet-200.zip, "),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["run", "--optimizer", "vsgd", *options(archives, tmp_path), *words.split()])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"python -m experiments: error: {message}")


def test_everything_that_runs_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    listed = capsys.readouterr().out
    assert {*paper.EXPERIMENTS, *paper.COMPARED, *tasks.TASKS, *comparison.ENTRANTS} <= set(listed.split())
    assert "60000 steps of 64 images, learning rate halved every 20000" in listed


# The settings, and the table of runs with them

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
    # An optimizer that the paper does not compare runs at its own default.
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
    every = [(name, optimizer) for name in paper.EXPERIMENTS for optimizer in paper.COMPARED]
    found = [record(*which, seed, 0.6 + 0.02 * seed) for which in every for seed in range(3)]
    page = page_of(tmp_path, [*found, record(VGG16, "sgd", 1, 0.7, backend="torch")])
    assert "On Keras' jax backend, a GPU with keras 3:" in page
    # The page separates backends.
    assert page.index("62.00 ± 2.00 (3 seeds)") < page.index("On Keras' torch backend") < page.index("70.00 (1 seed)")
    # The sample standard deviation of 60, 62 and 64 is 2.
    assert page.count("62.00 ± 2.00 (3 seeds)") == len(every)
    images = [f"paper-{data}-jax.svg" for data in datasets.SOURCES]
    assert [f"]({path.name})" in page for path in sorted(tmp_path.glob("*-jax.svg"))] == [True] * len(images)


def test_no_cell_is_filled_from_other_settings_or_other_data(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [{"iterations": 500}, {"learning_rate": 0.01}, {"batch_size": 128}]
    others += [{"hyper": {"weight_decay": 0.1}}, {"digest": datasets.SOURCES["tiny-imagenet"].digest}]
    every = [record(VGG16, "vsgd", 0, 0.6, **other) for other in others]
    page = page_of(tmp_path, [*every, record(VGG16, "lion", 0, 0.6)])
    assert paper_report.MISSING not in page
    assert "60.00" not in page
