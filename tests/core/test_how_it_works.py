"""The derivation of docs/how-it-works.md, against the core: by integrals on grids that know none of its closed forms."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from research.scripts import run

from reporting.examples import load_example
from vsgd import core

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
SCRIPT = DOCS / "how-it-works" / "figures.py"

Array = Any


class Density(NamedTuple):
    """A distribution on a grid: the points, the density's logarithm, and what each point weighs in an integral."""

    points: Array
    log: Array
    weight: Array

    def mean(self, values: Array) -> float:
        return float((self.weight * values).sum())


def density(points: Array, log: Array, spacing: Array) -> Density:
    """Normalized, by the trapezoidal rule on a fine grid that holds all of it."""
    mass = np.exp(log - log.max()) * spacing
    return Density(points, log - log.max() - math.log(mass.sum()), mass / mass.sum())


def normal(mean: float, variance: float) -> Density:
    points = mean + math.sqrt(variance) * np.linspace(-12, 12, 4001)
    return density(points, -((points - mean) ** 2) / (2 * variance), points[1] - points[0])


def gamma(shape: float, rate: float) -> Density:
    """Equally spaced in the logarithm, of which the precision is the derivative."""
    points = np.exp(np.linspace(-60, 6, 8001)) * shape / rate
    return density(points, (shape - 1) * np.log(points) - rate * points, points)


class Case(NamedTuple):
    """A step: the hyperparameters, the state that it finds, what it sees, and its number."""

    hyper: Any
    state: tuple[float, ...]
    grad: float
    step: int


CASES = (
    Case(core.Hyperparameters(variance_ratio=5.0, prior_strength=0.3, eps=0.0), (0.7, 0.4, 1.9), -0.5, 1),
    Case(core.Hyperparameters(variance_ratio=30.0, prior_strength=0.8, eps=0.0), (-1.2, 2.5, 0.6), 2.0, 7),
    Case(core.Hyperparameters(variance_ratio=2.0, prior_strength=2.0, kappa1=0.6, eps=0.0), (0.1, 0.02, 0.03), 0.1, 40),
)
CONSTANT_CASES = (
    Case(core.ConstantHyperparameters(variance_ratio=5.0, prior_strength=0.3, eps=0.0), (0.7, 0.4), -0.5, 1),
    Case(core.ConstantHyperparameters(variance_ratio=0.5, prior_strength=0.8, eps=0.0), (-1.2, 2.5), 2.0, 7),
)


class Model:
    """VSGD's model of one step, each distribution as the page states it."""

    rule = core.VSGD
    kappas: ClassVar[tuple[str, ...]] = ("kappa1", "kappa2")

    def __init__(self, case: Case) -> None:
        self.case = case
        self.shape = core.compute_shape(case.hyper)
        self.precisions = [gamma(self.shape, rate) for rate in case.state[1:]]

    def drift(self, precisions: list[Density]) -> Density:
        """The precision of the drift."""
        return precisions[0]

    def noise(self, precisions: list[Density]) -> tuple[Density, float]:
        """The precision of the noise, in units of its second number."""
        return precisions[1], 1.0

    def log_prior(self, precisions: list[Density]) -> float:
        """The expected logarithm of the priors, up to a constant."""
        strength = self.case.hyper.prior_strength
        rates = strength, self.case.hyper.variance_ratio * strength
        pairs = zip(precisions, rates, strict=True)
        return sum(each.mean((strength - 1) * np.log(each.points) - rate * each.points) for each, rate in pairs)

    def log_joint(self, grads: Array, precisions: list[Density]) -> Array:
        """The expected logarithm of what is seen and of the gradient, at each gradient, up to a constant."""
        drift, (noise, unit) = self.drift(precisions), self.noise(precisions)
        mean_before, seen = self.case.state[0], self.case.grad
        return (
            drift.mean(np.log(drift.points)) / 2
            + noise.mean(np.log(noise.points)) / 2
            - drift.mean(drift.points) * (grads - mean_before) ** 2 / 2
            - unit * noise.mean(noise.points) * (seen - grads) ** 2 / 2
        )

    def elbo(self, gradient: Density, precisions: list[Density]) -> float:
        joint = gradient.mean(self.log_joint(gradient.points, precisions)) + self.log_prior(precisions)
        # A Gamma's density is by its logarithm here, as the grid's spacing is: both entropies shift by what does not move.
        return joint - sum(factor.mean(factor.log) for factor in (gradient, *precisions))

    def after(self, step: int) -> tuple[float, tuple[float, ...]]:
        """The core's direction and state after a step of this number; the first one has a rho of 1."""
        update = self.rule.make_update(np)
        return update(self.case.grad, self.case.state, self.rule.coefficients(step, self.case.hyper))

    def gradient(self) -> tuple[float, float]:
        """The core's mean and variance of the gradient."""
        direction, (mean, *_) = self.after(1)
        return mean, (mean / direction) ** 2 - mean**2

    def optimum(self) -> list[tuple[float, float]]:
        """The core's shapes and rates for the precisions, as this step alone would have them."""
        _, (_, *rates) = self.after(1)
        return [(self.case.hyper.prior_strength + 0.5, rate) for rate in rates]


class ConstantModel(Model):
    """Constant VSGD's: one precision for both."""

    rule = core.CONSTANT_VSGD
    kappas = ("kappa",)

    def __init__(self, case: Case) -> None:
        self.case = case
        self.shape = core.compute_constant_shape(case.hyper)
        self.precisions = [gamma(self.shape, case.state[1])]

    def noise(self, precisions: list[Density]) -> tuple[Density, float]:
        return precisions[0], 1 / self.case.hyper.variance_ratio

    def log_prior(self, precisions: list[Density]) -> float:
        (omega,), strength = precisions, self.case.hyper.prior_strength
        return omega.mean((strength - 1) * np.log(omega.points) - strength * omega.points)

    def optimum(self) -> list[tuple[float, float]]:
        _, (_, rate) = self.after(1)
        return [(self.case.hyper.prior_strength + 1, rate)]


models = pytest.mark.parametrize("model", [*map(Model, CASES), *map(ConstantModel, CONSTANT_CASES)])


@models
def test_step_1_is_bayes_rule_for_the_expected_precisions(model: Model) -> None:
    mean, variance = model.gradient()
    points = mean + math.sqrt(variance) * np.linspace(-12, 12, 4001)
    posterior = density(points, model.log_joint(points, model.precisions), points[1] - points[0])
    assert posterior.mean(points) == pytest.approx(mean, rel=1e-7)
    assert posterior.mean((points - mean) ** 2) == pytest.approx(variance, rel=1e-7)


@models
def test_steps_2_and_3_go_up_the_natural_gradient_to_the_optimum(model: Model) -> None:
    gradient = normal(*model.gradient())
    _, (_, *rates) = model.after(model.case.step)
    # The code's shape has a little more than the paper's.
    assert [shape for shape, _ in model.optimum()] == pytest.approx([model.shape] * len(rates), abs=1.1e-4)
    for place, (before, after, kappa) in enumerate(zip(model.case.state[1:], rates, model.kappas, strict=True)):
        rho = model.case.step ** -getattr(model.case.hyper, kappa)

        def elbo(natural: Array, place: int = place) -> float:
            factors = [*model.precisions]
            factors[place] = gamma(natural[0] + 1, -natural[1])
            return model.elbo(gradient, factors)

        here, small = np.array([model.shape - 1, -before]), 1e-5
        slope = np.array([elbo(here * (1 + small * unit)) - elbo(here * (1 - small * unit)) for unit in np.eye(2)])
        slope /= 2 * small * here
        factor = model.precisions[place]
        statistics = np.stack([np.log(factor.points), factor.points])
        fisher = np.cov(statistics, aweights=factor.weight, ddof=0)
        natural_gradient = np.linalg.solve(fisher, slope)
        shape, rate = model.optimum()[place]
        np.testing.assert_allclose(natural_gradient, [shape - model.shape, before - rate], rtol=1e-4, atol=1e-6)
        assert after == pytest.approx(before - rho * natural_gradient[1], rel=1e-5)


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
    *_, line = figures.draw_direction().axes[0].lines
    ratio, direction = line.get_data()
    np.testing.assert_allclose(direction, ratio / np.sqrt(1 + ratio**2), atol=1e-12)


def test_the_command_writes_its_table_and_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    printed = run(str(SCRIPT), "--steps", "20", "--output", str(tmp_path))
    assert (tmp_path / "filtering.txt").read_text(encoding="utf-8") == printed
    figures = {each.name for each in tmp_path.glob("*.png")}
    assert figures == {each.name for each in SCRIPT.parent.glob("*.png")}
    assert figures == set(re.findall(r"how-it-works/(\w+\.png)", PAGE))
