"""Run the main comparison."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from research.scripts import need, run

need("torch", "mnist1d", "matplotlib", "tqdm")

from experiments import quickstart  # noqa: E402


def train(name: str, seed: int, steps: int, **options: Any) -> Any:
    return quickstart.train(name, seed, quickstart.load_data(), steps, **options)


def test_command_prints_table_and_draws(tmp_path: Path) -> None:
    output = tmp_path / "figure.svg"
    given = ("--steps", "60", "--seeds", "2", "--output", str(output))
    _, *rows, last = run("-m", "experiments.quickstart", *given).splitlines()
    assert [re.split("  +", row)[0] for row in rows] == list(quickstart.ENTRANTS)
    for row in rows:
        _, accuracy, train_loss, step_time = (
            [float(number) for number in cell.split(" ± ")] for cell in re.split("  +", row)[1:]
        )
        assert len(accuracy) == len(train_loss) == 2
        assert 0 <= accuracy[0] <= 100
        assert 0 < min(train_loss[0], step_time[0]) < float("inf")
    assert last == f"wrote {output}"
    assert output.stat().st_size > 10_000


@pytest.mark.parametrize("name", ["VSGD", "Constant VSGD, auto"])
def test_vsgd_learns(name: str) -> None:
    done = train(name, seed=0, steps=400)
    assert done.scores["test accuracy (%)"] > 60
    assert list(done.gains) == (list(quickstart.LAYERS) if name == "VSGD" else [])
    assert all(0 < gain < 1 for gains in done.gains.values() for gain in gains)


def test_a_bad_option_is_named() -> None:
    message = "--steps is 0 and --seeds is 5, but both must be at least 1"
    assert message in run("-m", "experiments.quickstart", "--steps=0", code=2)


def test_every_optimizer_starts_alike_and_a_seed_decides_all() -> None:
    still = {name: train(name, seed=1, steps=1, lr=0.0).scores for name in quickstart.ENTRANTS}
    assert len({scores["train loss"] for scores in still.values()}) == 1
    once, again, other = (train("VSGD", seed=seed, steps=50).scores for seed in (1, 1, 2))
    assert once == again != other


def test_the_rate_rises_in_the_warm_up_and_falls_to_0() -> None:
    warm, plain = quickstart.ENTRANTS["AdamW, warm-up"], quickstart.ENTRANTS["VSGD"]
    assert quickstart.choose_rate(warm, warm.warm_up / 2) == pytest.approx(quickstart.choose_rate(plain, warm.warm_up / 2) / 2)
    assert [quickstart.choose_rate(plain, part) for part in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
