"""The paper's settings, as the authors' configuration has them, and what counts as having them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from experiments import datasets, paper

VGG16, RESNEXT = "cifar100-vgg16", "tiny-imagenet-resnext"


def test_the_settings() -> None:
    found = {name: (each.iterations, each.batch_size, each.halve_every) for name, each in paper.EXPERIMENTS.items()}
    cifar100, tiny = (30_000, 256, 10_000), (60_000, 128, 20_000)
    assert found == {
        "cifar100-vgg16": cifar100,
        "cifar100-vgg19": cifar100,
        "cifar100-convmixer": cifar100,
        "cifar100-resnext": (30_000, 128, 10_000),
        "tiny-imagenet-vgg16": tiny,
        "tiny-imagenet-vgg19": tiny,
        "tiny-imagenet-convmixer": tiny,
        "tiny-imagenet-resnext": (60_000, 64, 20_000),
    }
    assert {name: paper.make_settings(VGG16, name).learning_rate for name in ("vsgd", "adam", "adamw", "sgd")} == {
        "vsgd": 0.1,
        "adam": 0.001,
        "adamw": 0.001,
        "sgd": 0.1,
    }
    assert paper.make_settings(VGG16, "sgd").hyper == {"momentum": 0.9}
    assert set(paper.COMPARED) == {"vsgd", "constant-vsgd", "adam", "adamw", "sgd"}


def test_what_is_named_stands_in_for_the_papers() -> None:
    found = paper.make_settings(VGG16, "sgd", 7, iterations=20, learning_rate=None, batch_size=4, hyper={"weight_decay": 0.1})
    assert (found.iterations, found.evaluate_every, found.batch_size) == (20, 20, 4)
    assert (found.learning_rate, found.seed, found.halve_every) == (0.1, 7, 10_000)
    assert found.hyper == {"momentum": 0.9, "weight_decay": 0.1}
    # One that the paper does not compare runs at its own default.
    assert paper.make_settings(VGG16, "lion").learning_rate == 0.001


@pytest.mark.parametrize(
    ("experiment", "optimizer", "other", "message"),
    [
        ("cifar10-vgg16", "vsgd", {}, "experiment is 'cifar10-vgg16', but must be one of cifar100-vgg16, cifar100-vgg19, "),
        (VGG16, "adm", {}, "optimizer is 'adm', but must be one of vsgd, "),
        (VGG16, "vsgd", {"batch_size": 0}, "batch_size is 0, but must be finite and at least 1"),
        (VGG16, "vsgd", {"iterations": -2}, "iterations is -2, but must be finite and at least 1"),
        (VGG16, "vsgd", {"seed": -1}, "seed is -1, but must be finite and at least 0"),
        (VGG16, "vsgd", {"learning_rate": -1.0}, "learning_rate is -1.0, but must be finite and at least 0"),
        (VGG16, "vsgd", {"learning_rate": float("nan")}, "learning_rate is nan, but must be finite and at least 0"),
        (VGG16, "vsgd", {"learning_rate": float("inf")}, "learning_rate is inf, but must be finite and at least 0"),
        (VGG16, "vsgd", {"iterations": 700}, "iterations is 700, but must be a multiple of evaluate_every, 500"),
    ],
)
def test_wrong_settings_are_said(experiment: str, optimizer: str, other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paper.make_settings(experiment, optimizer, **other)


def key(experiment: str = VGG16, optimizer: str = "vsgd", digest: str | None = None, **other: Any) -> dict[str, Any]:
    source = datasets.SOURCES[paper.EXPERIMENTS[experiment].data]
    chosen = paper.make_settings(experiment, optimizer, **other)
    return json.loads(json.dumps(chosen.make_key("jax", source.digest if digest is None else digest)))


def test_the_papers_runs_are_those_with_its_settings_and_data() -> None:
    for experiment in paper.EXPERIMENTS:
        for optimizer in paper.COMPARED:
            assert paper.has_paper_settings(key(experiment, optimizer, seed=5))
    assert not paper.has_paper_settings(key(digest="other"))
    assert not paper.has_paper_settings(key(RESNEXT, digest=key(VGG16)["data"]))
    assert not paper.has_paper_settings(key(optimizer="lion"))
    for other in ({"iterations": 500}, {"learning_rate": 0.01}, {"batch_size": 128}, {"hyper": {"weight_decay": 0.1}}):
        assert not paper.has_paper_settings(key(**other)), other


def test_all_is_listed() -> None:
    listed = paper.format_overview()
    for name in (*paper.EXPERIMENTS, *paper.COMPARED):
        assert f"{name} " in listed
    assert "60000 steps of 64 images, learning rate halved every 20000" in listed
