"""Test the derivation in docs/how-it-works.md against the core, by numerical integrals that use none of its closed forms."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from research.scripts import run

from reporting.examples import load_example
from vsgd import core

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
SCRIPT = DOCS / "how-it-works" / "figures.py"

Array = Any


class Case(NamedTuple):
    """A step: its rule and hyperparameters, the state before it, the gradient, and its number."""

    rule: core.Rule
    hyper: Any
    state: tuple[float, ...]
    grad: float
    step: int

    def after(self, step: int) -> tuple[float, tuple[float, ...]]:
        """Return the core's direction and state after a step of this number; step 1 has a rho of 1."""
        return self.rule.make_update(np)(self.grad, self.state, self.rule.coefficients(step, self.hyper))

    def shape(self) -> float:
        """Return the core's shape of every precision."""
        of = core.compute_shape if self.rule is core.VSGD else core.compute_constant_shape
        return of(self.hyper)

    def expected_precisions(self) -> list[Any]:
        """Return the means of the precisions' Gamma distributions before the step."""
        return [self.shape() / rate for rate in self.state[1:]]

    def gradient(self) -> tuple[float, float]:
        """Return the core's mean and variance of the gradient."""
        direction, (mean, *_) = self.after(1)
        return mean, (mean / direction) ** 2 - mean**2

    def log_joint(self, grads: Array, precisions: list[Array]) -> Array:
        """Return the log density, up to a constant, of the observation, the gradient and the precisions in the page's model."""
        strength, ratio = self.hyper.prior_strength, self.hyper.variance_ratio
        drift, noise = precisions if self.rule is core.VSGD else (precisions[0], precisions[0] / ratio)
        rates = (strength, ratio * strength)[: len(precisions)]
        prior = sum((strength - 1) * np.log(each) - rate * each for each, rate in zip(precisions, rates, strict=True))
        of_gradient = np.log(drift) / 2 - drift * (grads - self.state[0]) ** 2 / 2
        return prior + of_gradient + np.log(noise) / 2 - noise * (self.grad - grads) ** 2 / 2


_of_vsgd, _of_constant = core.Hyperparameters, core.ConstantHyperparameters
cases = pytest.mark.parametrize(
    "case",
    [
        Case(core.VSGD, _of_vsgd(variance_ratio=5.0, prior_strength=0.3, eps=0.0), (0.7, 0.4, 1.9), -0.5, 1),
        Case(core.VSGD, _of_vsgd(variance_ratio=30.0, prior_strength=0.8, eps=0.0), (-1.2, 2.5, 0.6), 2.0, 7),
        Case(core.VSGD, _of_vsgd(variance_ratio=2.0, prior_strength=2.0, kappa1=0.6, eps=0.0), (0.1, 0.02, 0.03), 0.1, 40),
        Case(core.CONSTANT_VSGD, _of_constant(variance_ratio=5.0, prior_strength=0.3, eps=0.0), (0.7, 0.4), -0.5, 1),
        Case(core.CONSTANT_VSGD, _of_constant(variance_ratio=0.5, prior_strength=0.8, eps=0.0), (-1.2, 2.5), 2.0, 7),
    ],
)


def moments(points: Array, log: Array) -> tuple[float, float]:
    """Return mean and variance of a density with this logarithm, by the trapezoidal rule on a fine grid that covers it."""
    weights = np.exp(log - log.max())
    mean = np.average(points, weights=weights)
    return mean, np.average((points - mean) ** 2, weights=weights)


@cases
def test_step_1_is_bayes_rule_for_the_expected_precisions(case: Case) -> None:
    mean, variance = case.gradient()
    points = mean + math.sqrt(variance) * np.linspace(-12, 12, 4001)
    log = case.log_joint(points, case.expected_precisions())
    assert moments(points, log) == pytest.approx((mean, variance), rel=1e-7)


@cases
def test_steps_2_and_3_go_rho_of_the_way_to_the_optimum(case: Case) -> None:
    # For such distributions the move is rho times the natural gradient of the bound.
    mean, variance = case.gradient()
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)  # for a normal; exact for the averaged square
    _, (_, *rates) = case.after(case.step)
    kappas = ("kappa1", "kappa2") if case.rule is core.VSGD else ("kappa",)
    for place, (before, after, kappa) in enumerate(zip(case.state[1:], rates, kappas, strict=True)):
        # The points are equally spaced in the logarithm, whose derivative contributes a factor of the precision.
        precisions, points = case.expected_precisions(), np.exp(np.linspace(-60, 6, 8001)) * case.shape() / before
        precisions[place] = points[:, None]
        expected = case.log_joint(mean + math.sqrt(variance) * nodes, precisions) @ (weights / weights.sum())
        best_mean, best_variance = moments(points, expected + np.log(points))
        # A Gamma's moments determine its rate and shape. The code's shape is slightly larger than the paper's.
        assert best_mean**2 / best_variance == pytest.approx(case.shape(), abs=1.1e-4)
        rho = case.step ** -getattr(case.hyper, kappa)
        assert after == pytest.approx((1 - rho) * before + rho * best_mean / best_variance, rel=1e-6)


@pytest.mark.parametrize("kappa", [0.6, 0.81, 1.0])
def test_a_rate_is_an_average_of_what_each_step_alone_would_have(kappa: float, figures: ModuleType) -> None:
    hyper = core.Hyperparameters(kappa1=kappa, kappa2=kappa)
    update, state = core.VSGD.make_update(np), core.VSGD.initial_state(hyper)
    alone = []
    for step, grad in enumerate(np.random.default_rng(0).standard_normal(50), start=1):
        alone.append(update(grad, state, core.VSGD.coefficients(1, hyper))[1][1:])
        _, state = update(grad, state, core.VSGD.coefficients(step, hyper))
    weights = figures.compute_weights(50, kappa)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights @ np.array(alone), state[1:], rtol=1e-12)
    if kappa == 1:
        np.testing.assert_allclose(weights, 1 / 50)


def test_the_memory_at_step_1000_is_as_the_page_says() -> None:
    coefficients = core.VSGD.coefficients(1000, core.VSGD.hyperparameters())
    memories = [1 / (2 * half) for half in (coefficients.half_rho_g, coefficients.half_rho_ghat)]
    assert "over {:.0f} for $b_g$ and {:.0f} for".format(*memories) in PAGE


def test_every_name_of_the_table_is_in_the_core() -> None:
    source = Path(core.__file__).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \| ", PAGE, flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) > 15
    assert [name for name in names if not re.search(rf"\b{name}\b", source)] == []


@pytest.fixture
def figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    return load_example("../docs/how-it-works/figures")


def test_the_table_is_what_the_script_makes(figures: ModuleType) -> None:
    assert (SCRIPT.parent / "filtering.txt").read_text(encoding="utf-8") == figures.format_table(figures.filter_all(500))


def test_the_figure_of_the_direction_is_the_cores(figures: ModuleType) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    figures.draw_direction(figure)
    *_, line = figure.axes[0].lines
    ratio, direction = line.get_data()
    np.testing.assert_allclose(direction, ratio / np.sqrt(1 + ratio**2), atol=1e-12)


def test_the_command_writes_its_table_and_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    printed = run(str(SCRIPT), "--steps", "20", "--output", str(tmp_path))
    assert (tmp_path / "filtering.txt").read_text(encoding="utf-8") == printed
    figures = {each.name for each in tmp_path.glob("*.svg")}
    assert figures == {each.name for each in SCRIPT.parent.glob("*.svg")}
    assert figures == set(re.findall(r"how-it-works/(\w+\.svg)", PAGE))
