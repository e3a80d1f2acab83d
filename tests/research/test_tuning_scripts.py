"""The script of the priors that makes tables of `docs/tuning.md`, run in a small setting."""

from __future__ import annotations

from pathlib import Path

import pytest
from research.scripts import run

for package in ("torch", "sklearn"):
    pytest.importorskip(package)


def test_the_tables_of_priors(tmp_path: Path) -> None:
    given = ("--steps", "100", "--seeds", "1", "--rates", "0.003", "0.01", "--data", "digits", "--output", str(tmp_path))
    printed = run("-m", "experiments.tuning.prior", *given)
    texts = [(tmp_path / f"prior_{name}.txt").read_text(encoding="utf-8") for name in ("scale", "run_away", "rates")]
    assert printed == "\n".join(texts)
    scale, run_away, rates = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]] for text in texts
    )
    # Scaled losses of a real model.
    assert len(scale) == 2 * 2 * 3
    for _, kind, _, prior, *losses, apart, farthest in scale:
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
    # Least squares run away with the default prior alone.
    for kind, lr, *cells in run_away:
        if kind == "VSGD" and lr in ("0.1", "0.3"):
            default, *others = map(float, cells[::2])
            assert default > 1.5
            assert max(others) <= 1
    # The best rate is marked, and compared with the default's, which is first.
    assert len(rates) == 2 * 4
    best: dict[str, float] = {}
    for _, kind, prior, *losses, ratio in rates:
        (marked,) = (float(loss.strip("*")) for loss in losses if loss.startswith("**"))
        assert marked == min(float(loss.strip("*")) for loss in losses)
        best.setdefault(kind, marked)
        assert float(ratio.split()[0]) == pytest.approx(marked / best[kind], rel=0.1), prior
