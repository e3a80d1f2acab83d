"""Test that gradients beyond the state's prediction are cut, and accepted if they persist."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drivers import AVAILABLE, start
from drivers.rules import RULES

from vsgd import core
from vsgd.outliers import choose_rule
from vsgd.posterior import predict_variance

SIZE = 500
engines = pytest.mark.parametrize("engine", AVAILABLE)
kinds = pytest.mark.parametrize("kind", ["VSGD", "ConstantVSGD"])


def gradients(steps: int, corrupted: int | None = None) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    grads = [(0.5 + rng.standard_normal(SIZE)).astype(np.float32) for _ in range(steps)]
    if corrupted is not None:
        grads[corrupted] *= np.float32(1e4)
    return grads


def run(engine: str, kind: str, grads: list[np.ndarray], **hyper: Any) -> dict[str, np.ndarray]:
    step, read = start(engine, kind, [np.zeros(SIZE, np.float32)], **hyper)
    for grad in grads:
        step([grad])
    return read()[0]


@engines
@kinds
def test_without_outliers_nothing_changes(engine: str, kind: str) -> None:
    plain = run(engine, kind, gradients(30))
    guarded = run(engine, kind, gradients(30), outlier_threshold=1e6)
    # XLA contracts different products in another program.
    ulps = 4 if engine.endswith("jit") else 0
    for name, values in plain.items():
        tolerance = ulps * np.finfo(np.float32).eps * np.abs(values).max()
        np.testing.assert_allclose(guarded[name], values, rtol=0, atol=tolerance)


@engines
@pytest.mark.parametrize("corrupted", [0, 3, 200])
def test_one_corrupted_batch_ruins_the_noise_estimate_without_it_and_not_with_it(engine: str, corrupted: int) -> None:
    clean = run(engine, "VSGD", gradients(600), promise="many steps")["b_ghat"]
    after = gradients(600, corrupted)
    ruined = run(engine, "VSGD", after)["b_ghat"]
    kept = run(engine, "VSGD", after, outlier_threshold=5.0)["b_ghat"]
    # At the end of the run the unguarded estimate is still a thousand times too high.
    assert np.median(ruined / clean) > 1e3
    assert np.median(kept / clean) == pytest.approx(1.0, abs=0.12)


@engines
@kinds
def test_what_is_cut_widens_the_rates_and_is_cut_to_the_widened_limit(engine: str, kind: str) -> None:
    rule, threshold = RULES[kind], 3.0
    hyper = rule.hyperparameters()
    before = run(engine, kind, gradients(20), outlier_threshold=threshold)
    mu_g, *rates = state = tuple(before[name].astype(np.float64) for name in rule.state_names)
    scales = rule.variance_scales(hyper)
    widening = 1.1 + threshold**2 * 21.0 ** -hyper[rule.hyperparameters._fields.index("eps") - 1]
    limit = threshold * np.sqrt(widening * predict_variance(state, scales))
    drift, noise = rates[0] * scales[0], rates[-1] * scales[1]
    for sign in (-1.0, 1.0):
        after = run(engine, kind, [*gradients(20), np.full(SIZE, sign * np.inf, np.float32)], outlier_threshold=threshold)
        np.testing.assert_allclose(after["mu_g"], mu_g + sign * limit * drift / (drift + noise), rtol=1e-5, atol=1e-7)
        for name, rate in zip(rule.state_names[1:], rates, strict=True):
            np.testing.assert_allclose(after[name], rate * widening, rtol=1e-5)


@engines
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_it_converges_where_gradients_dwarf_the_prior(engine: str, noise: float) -> None:
    rng, param = np.random.default_rng(0), np.full(16, 10.0, np.float32)
    step, read = start(engine, "VSGD", [param], promise="many steps", lr=0.02, outlier_threshold=5.0)
    for _ in range(2000):
        step([(2 * (param + 1) + noise * rng.standard_normal(16)).astype(np.float32)])
        param = read()[0]["param"]
    assert np.abs(param + 1).mean() < 0.2


@engines
@kinds
def test_gradients_that_grow_tenfold_for_good_are_believed_within_50_steps(engine: str, kind: str) -> None:
    grads = gradients(250)
    for grad in grads[200:]:
        grad *= 10
    plain, guarded = run(engine, kind, grads, promise="many steps"), run(engine, kind, grads, outlier_threshold=5.0)
    noise = RULES[kind].state_names[-1]
    # Both runs estimate a noise variance a hundred times as large as before.
    assert 0.9 < np.median(guarded[noise] / plain[noise]) < 2
    assert guarded["mu_g"].mean() > 0.9 * plain["mu_g"].mean()


@engines
def test_nan_shows_and_nowhere_else(engine: str) -> None:
    grad = gradients(1)[0]
    grad[7] = np.nan
    after = run(engine, "VSGD", [*gradients(5), grad], outlier_threshold=3.0)
    assert np.isnan(after["param"][7])
    assert np.isnan(after["mu_g"][7])
    assert np.isfinite(np.delete(after["param"], 7)).all()


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), "3"])
@engines
def test_a_bad_threshold_is_refused(engine: str, threshold: Any) -> None:
    with pytest.raises(ValueError, match="outlier_threshold must be a number in"):
        run(engine, "VSGD", [], outlier_threshold=threshold)


def test_without_a_threshold_the_rule_is_the_plain_one() -> None:
    assert choose_rule(core.VSGD, None) is core.VSGD
    assert choose_rule(core.VSGD, 3.0) is choose_rule(core.VSGD, 4.0)


@pytest.mark.compiler
def test_a_compiled_step_cuts_too() -> None:
    torch = pytest.importorskip("torch")
    from vsgd.torch import VSGD

    ends = []
    for compiled in (False, True):
        torch.compiler.reset()
        param = torch.nn.Parameter(torch.zeros(SIZE))
        optimizer = VSGD([param], outlier_threshold=3.0, fused=False)
        step = torch.compile(optimizer.step, fullgraph=False) if compiled else optimizer.step
        for grad in gradients(12, corrupted=8):
            param.grad = torch.from_numpy(grad)
            step()
        ends.append(param.detach())
    torch.testing.assert_close(ends[0], ends[1])
