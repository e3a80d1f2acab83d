"""The golden trajectories of the authors' code, and how far a run deviates from them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_FOLDER = Path(__file__).parents[1] / "golden"
_CASES = json.loads((_FOLDER / "cases.json").read_text())
_OUR_NAMES = {"ghattg": "variance_ratio", "ps": "prior_strength", "tau1": "kappa1", "tau2": "kappa2"}

CASES = tuple(_CASES)


class Golden(NamedTuple):
    """One case: the inputs, and the results of the authors' code, in float64, time first.

    Attributes:
        hyper: constructor arguments by our names, except `lr`.
        lr: step sizes, (steps,).
        params0: the parameters at the start.
        grads: the gradients of each parameter, (steps, *shape).
        after: for each parameter its value and state after each step: `param`, `mu_g`, `b_g`, `b_ghat`, (steps, *shape).
    """

    hyper: dict[str, float]
    lr: np.ndarray
    params0: list[np.ndarray]
    grads: list[np.ndarray]
    after: list[dict[str, np.ndarray]]


@functools.cache
def golden(case: str) -> Golden:
    arrays = np.load(_FOLDER / f"{case}_f64.npz")
    indices = range(len(_CASES[case]["shapes"]))
    hyper = _CASES[case]["hyper"].items()
    return Golden(
        hyper={_OUR_NAMES.get(name, name): value for name, value in hyper if name != "lr"},
        lr=arrays["lr"],
        params0=[arrays[f"param0_{i}"] for i in indices],
        grads=[arrays[f"grad_{i}"] for i in indices],
        after=[
            {
                "param": arrays[f"param_{i}"],
                "mu_g": arrays[f"mug_{i}"],
                "b_g": arrays[f"bg_{i}"] / 2,
                "b_ghat": arrays[f"bhg_{i}"] / 2,
            }
            for i in indices
        ],
    )


class Deviation(NamedTuple):
    """The largest deviation of a run from a reference, relative to the reference's size.

    Attributes:
        error: the deviation; NaN where the run has a NaN.
        name: the array where it occurs.
        step: the step where it occurs, from 0.
    """

    error: float
    name: str
    step: int


def deviation(run: list[dict[str, np.ndarray]], reference: list[dict[str, np.ndarray]], axis: int | None = 0) -> Deviation:
    """Return the largest deviation of a run, relative to the largest value along `axis` of the reference.

    Args:
        run: for each parameter its arrays by name, time first.
        reference: the same, in float64.
        axis: 0: an element's largest value at any time; None: the array's largest.
    """
    assert len(run) == len(reference)
    worst = Deviation(0.0, "", 0)
    for ours, theirs in zip(run, reference, strict=True):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert ours[name].shape == expected.shape
            error = np.abs(np.asarray(ours[name], np.float64) - expected) / np.abs(expected).max(axis=axis)
            by_step = error.reshape(len(error), -1).max(axis=1)
            if not by_step.max() <= worst.error:  # NaN is worse than any number
                worst = Deviation(float(by_step.max()), name, int(by_step.argmax()))
    return worst


def assert_follows(run: list[dict[str, np.ndarray]], reference: list[dict[str, np.ndarray]], tolerance: float) -> None:
    """Assert that every element, at every step, is within `tolerance` of its largest value along the reference."""
    worst = deviation(run, reference)
    assert worst.error <= tolerance, f"{worst.name} strays by {worst.error:.1e} at step {worst.step}"


def stack(steps: list[list[dict[str, Any]]]) -> list[dict[str, np.ndarray]]:
    """Turn snapshots, by step and then parameter, into arrays by parameter with time first."""
    return [
        {name: np.stack([np.asarray(step[i][name]) for step in steps]) for name in steps[0][i]} for i in range(len(steps[0]))
    ]
