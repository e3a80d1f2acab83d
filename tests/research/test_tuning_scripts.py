"""The scripts that make the tables of `docs/tuning.md`, run in small settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]


def cells(text: str) -> list[list[str]]:
    """The rows of a table below its head, by cells."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """What `prior.py` prints, and writes, by the names of its files."""
    folder = tmp_path_factory.mktemp("tuning")
    given = ("--steps", "100", "--seeds", "1", "--rates", "0.003", "0.01", "--data", "digits", "--output", str(folder))
    command = [sys.executable, "-m", "experiments.tuning.prior", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    texts = {name: (folder / f"prior_{name}.txt").read_text(encoding="utf-8") for name in ("scale", "run_away", "rates")}
    assert done.stdout == "\n".join(texts.values())
    return {name: cells(text) for name, text in texts.items()}


def test_scaled_losses_of_a_real_model(tables: dict[str, list[list[str]]]) -> None:
    assert len(tables["scale"]) == 2 * 2 * 3
    for _, kind, _, prior, *losses, apart, farthest in tables["scale"]:
        plain, *scaled = map(float, losses)
        if prior == "from gradients, prior_shape 0":
            # Gradients by autograd, in float32.
            assert set(scaled) == {plain}
            assert apart == "0"
            assert 0 < float(farthest) < 1e-4
        elif prior == "default":
            assert scaled[:2] == pytest.approx([2.3, 2.3], abs=0.1)  # of ten classes: nothing was learned
            assert plain < 1
        else:
            assert scaled[:2] == pytest.approx([plain] * 2, rel=0.05)
        if kind == "VSGD" and prior != "from gradients, prior_shape 0":
            assert min(scaled[2:]) > 3 * plain


def test_least_squares_run_away_with_the_default_alone(tables: dict[str, list[list[str]]]) -> None:
    highest = {row[:2][-1]: [float(cell) for cell in row[2::2]] for row in tables["run_away"] if row[0] == "VSGD"}
    for lr in ("0.1", "0.3"):
        default, *others = highest[lr]
        assert default > 1.5
        assert max(others) <= 1


def test_the_best_rate_is_marked_and_compared(tables: dict[str, list[list[str]]]) -> None:
    assert len(tables["rates"]) == 2 * 4
    best: dict[str, float] = {}
    for _, kind, prior, *losses, beside in tables["rates"]:
        (marked,) = (loss for loss in losses if loss.startswith("**"))
        assert float(marked.strip("*")) == min(float(loss.strip("*")) for loss in losses)
        best.setdefault(kind, float(marked.strip("*")))  # the default is first
        assert float(beside.split()[0]) == pytest.approx(float(marked.strip("*")) / best[kind], rel=0.1), prior
