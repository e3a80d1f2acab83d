"""Gradients that are cut to what the state predicts."""

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
    for name in plain:
        np.testing.assert_array_equal(guarded[name], plain[name])


@engines
def test_one_corrupted_batch_ruins_b_without_it_and_not_with_it(engine: str) -> None:
    grads, corrupted = gradients(600), 200
    clean = run(engine, "VSGD", grads)["b_ghat"]
    after = gradients(600, corrupted)
    ruined = run(engine, "VSGD", after)["b_ghat"]
    kept = run(engine, "VSGD", after, outlier_threshold=5.0)["b_ghat"]
    # 400 steps later the noise is still thought a thousand times as large.
    assert np.median(ruined / clean) > 1e3
    assert np.median(kept / clean) == pytest.approx(1.0, abs=0.1)


@engines
@kinds
def test_what_is_cut_is_cut_to_the_limit(engine: str, kind: str) -> None:
    rule = RULES[kind]
    before = run(engine, kind, gradients(20), outlier_threshold=3.0)
    state = tuple(before[name] for name in rule.state_names)
    limit = 3.0 * np.sqrt(predict_variance(state, rule.variance_scales(rule.hyperparameters())))
    for sign in (-1.0, 1.0):
        far = np.full(SIZE, sign * np.inf, np.float32)
        at_the_limit = (before["mu_g"] + sign * limit).astype(np.float32)
        ends = [run(engine, kind, [*gradients(20), grad], outlier_threshold=3.0) for grad in (far, at_the_limit)]
        for name in rule.state_names:
            np.testing.assert_allclose(ends[0][name], ends[1][name], rtol=1e-5)


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
    with pytest.raises(ValueError, match="outlier_threshold must be a finite number > 0"):
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
