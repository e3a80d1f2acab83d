"""Run the examples in small settings; `tests/scaling` tests those that are killed and resumed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from research.scripts import ROOT, need, run


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda example: example.stem)
def test_an_example_is_short_and_shows_its_progress(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert "from tqdm import tqdm" in text


def test_in_torch_a_network_learns_and_its_gains_are_printed() -> None:
    need("torch", "mnist1d", "tqdm")
    first, *rows = run("examples/quickstart.py", "--steps", "400").splitlines()
    assert float(re.fullmatch(r"test accuracy ([\d.]+)%", first)[1]) > 60
    found = [re.fullmatch(r"(\S+) +median gain ([\d.]+), signal to noise [\d.e+-]+", row) for row in rows]
    assert [match and match[1] for match in found] == [
        f"{layer}.{kind}" for layer in (0, 2, 4, 7) for kind in ("weight", "bias")
    ]
    assert all(0 < float(match[2]) < 1 for match in found)


def test_in_jax_all_seeds_learn_the_digits() -> None:
    need("jax", "optax", "sklearn", "tqdm")
    rows = run("examples/jax_training.py", "--epochs", "5", JAX_PLATFORMS="cpu").splitlines()
    found = [re.fullmatch(r"seed (\d): loss ([\d.e+-]+), test accuracy ([\d.]+)%", row) for row in rows]
    assert [match and match[1] for match in found] == list("01234")
    assert all(float(match[2]) < 0.4 for match in found)
    assert all(float(match[3]) > 85 for match in found)


@pytest.mark.slow
def test_in_keras_a_network_learns_the_digits() -> None:
    need("keras", "sklearn", "tqdm")
    import keras

    row = run("examples/keras_training.py", "--epochs", "2")
    match = re.fullmatch(r"Keras (\S+) on (\w+): test accuracy ([\d.]+)%\n", row)
    assert match[1] == keras.__version__
    assert match[2] == os.environ["KERAS_BACKEND"]
    assert float(match[3]) > 75  # chance is a tenth


def test_a_noise_scale_is_printed_to_choose_a_batch_size_from() -> None:
    need("torch", "sklearn", "tqdm")
    *rows, last = run("examples/choose_batch_size.py", "--steps", "100").splitlines()
    found = [re.fullmatch(r"step (\d+): loss ([\d.]+), noise scale (-?\d+) ± (\d+) examples", row) for row in rows]
    assert [match and int(match[1]) for match in found] == [20, 40, 60, 80, 100]
    assert 0 < int(found[0][4]) < int(found[0][3]) < 1000
    assert last == "the batch size was 64"
