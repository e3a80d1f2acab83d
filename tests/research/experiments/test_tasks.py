"""Test the small tasks and their runs, on the Keras backend of this process."""

from __future__ import annotations

import dataclasses
import functools
from itertools import islice
from typing import Any

import numpy as np
import pytest
from research.scripts import need

keras = pytest.importorskip("keras")
need("mnist1d", "scipy", "sklearn")

from scipy import integrate, stats  # noqa: E402

from experiments import bench, networks, tasks  # noqa: E402
from experiments.comparison import ENTRANTS  # noqa: E402

STEPS = 100


def short(name: str, steps: int = STEPS) -> tasks.Task:
    return dataclasses.replace(tasks.TASKS[name], steps=steps)


@functools.cache
def bench_of(name: str, entrant: str) -> bench.Bench:
    """Return one bench for all tests, because compiling takes the longest."""
    return bench.Bench(short(name), ENTRANTS[entrant].make())


def to_numpy(tensor: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(tensor))


def test_the_quadratics_noise_has_the_curvatures_for_variances() -> None:
    batches = islice(tasks.TASKS["quadratic"].load_data().batches(np.random.default_rng(0)), 2000)
    noise = np.stack([batch.x[0] for batch in batches])
    # Five relative deviations: 1 / sqrt(2000) for a mean of 2000 normal numbers, and sqrt(2 / 2000) for a variance.
    np.testing.assert_allclose(noise.mean(axis=0) / np.sqrt(tasks.CURVATURES), 0, atol=0.112)
    np.testing.assert_allclose(noise.var(axis=0) / tasks.CURVATURES, 1, atol=0.158)


def test_each_step_has_its_learning_rate_and_its_batch() -> None:
    task, rates = short("quadratic", 3), [0.5, 0.0, 1.5]
    found = bench.Bench(task, keras.optimizers.SGD(0.1)).run(7, rates)
    (point,) = (each.astype(np.float64) for each in bench.make_initial_values(task, 7))
    losses = []
    for rate, batch in zip(rates, task.load_data().batches(np.random.default_rng(7)), strict=False):
        losses.append(np.sum(tasks.CURVATURES * point**2) / 2 + batch.x[0] @ point)
        point -= rate * (tasks.CURVATURES * point + batch.x[0])
    # The losses are float32 sums of 100 numbers.
    np.testing.assert_allclose(found.losses, losses, rtol=0, atol=1e-5)
    assert found.final["test"]["loss"] == pytest.approx(np.sum(tasks.CURVATURES * point**2) / 2, abs=1e-5)


def begin(entrant: str, seed: int) -> list[np.ndarray]:
    """Return the initial state of a VAE's run: the model's variables, then the batches of more than an epoch."""
    run = bench_of("digits-vae", entrant)
    run.run(seed + 1, [0.01] * 3)  # nothing of this run must remain
    batches = islice(run.start(seed), 20)
    return [*map(to_numpy, run.model.variables), *(array for batch in batches for array in (*batch.x, batch.y))]


def test_runs_of_a_seed_have_equal_weights_and_batches_whatever_the_optimizer() -> None:
    first = begin("vsgd", 3)
    assert len(first) == 10 + 20 * 3
    for entrant in ENTRANTS:
        for ours, theirs in zip(begin(entrant, 3), first, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    other = begin("vsgd", 4)
    equal = [each.ndim for each, another in zip(first, other, strict=True) if np.array_equal(each, another)]
    assert equal == [1] * 5  # the biases, which start at 0


def test_a_run_is_the_same_whatever_ran_before_and_one_that_diverges_has_no_final_metrics() -> None:
    run, rates = bench_of("digits-convmixer", "vsgd"), [0.01] * STEPS
    first = run.run(1, rates)
    assert run.run(2, rates) != first
    diverged = run.run(3, [1e20] * STEPS)
    assert diverged.final is None
    assert diverged.curve[0] is not None
    assert (diverged.curve[-1], diverged.losses[-1]) == (None, None)
    assert (len(diverged.curve), len(diverged.losses)) == (tasks.LOOKS + 1, tasks.LOOKS)
    assert run.run(1, rates) == first
    assert bench.Bench(run.task, ENTRANTS["vsgd"].make()).run(1, rates) == first


@pytest.mark.parametrize("name", ["digits-convmixer", "digits-vae", "mnist1d-cnn"])
def test_no_example_is_in_two_splits(name: str) -> None:
    splits = tasks.TASKS[name].load_data().splits
    rows = [split.x[0] if isinstance(split.x, tuple) else split.x for split in splits.values()]
    flat = np.concatenate([each.reshape(len(each), -1) for each in rows])
    assert len(np.unique(flat, axis=0)) == len(flat)
    assert [len(each) for each in rows] == ([4000, 2000, 2000] if name == "mnist1d-cnn" else [1077, 360, 360])


def test_an_epoch_has_each_example_at_most_once_and_the_next_another_order() -> None:
    batches = tasks.TASKS["digits-convmixer"].load_data().batches(np.random.default_rng(0))
    one, other = (np.concatenate([next(batches).x for _ in range(1077 // 64)]).reshape(-1, 64) for _ in range(2))
    assert len(np.unique(one, axis=0)) == len(np.unique(other, axis=0)) == len(one) == 1024
    assert not np.array_equal(one, other)


def windows(split: tasks.Split) -> list[str]:
    return ["".join(tasks.list_characters()[place] for place in [*x, y[-1]]) for x, y in zip(split.x, split.y, strict=True)]


def test_characters_are_windows_of_a_part_of_the_text_whose_targets_are_the_next_ones() -> None:
    data, text = tasks.make_character_data(), tasks.read_text()
    # Each of the last two splits gets one of ten blocks of 1024 characters.
    blocks = [text[start : start + 1024] for start in range(0, len(text) - 1023, 1024)]
    train = [each for number, each in enumerate(blocks) if number % 10 < 8]
    parts = {"train": train, "validation": blocks[8::10], "test": blocks[9::10]}
    batch = next(data.batches(np.random.default_rng(0)))
    for part, split in [*data.splits.items(), ("train", batch)]:
        np.testing.assert_array_equal(split.x[:, 1:], split.y[:, :-1])
        assert all(any(window in block for block in parts[part]) for window in windows(split))
        if part != "train":
            repeated = [window for window in windows(split) if any(window in block for block in train)]
            assert len(repeated) <= 0.01 * len(split.x)


def test_the_transformer_sees_no_later_character() -> None:
    model = networks.make_transformer(10, context=8, width=16, depth=1, heads=2)
    x = np.random.default_rng(0).integers(10, size=(1, 8)).astype(np.int32)
    changed = x.copy()
    changed[0, 5] = (x[0, 5] + 1) % 10
    before, after = (to_numpy(model(each))[0] for each in (x, changed))
    np.testing.assert_allclose(after[:5], before[:5], rtol=0, atol=1e-6)
    assert np.abs(after[5:] - before[5:]).max(axis=1).min() > 1e-4


def test_the_negative_elbo_is_that_of_the_distributions() -> None:
    rng = np.random.default_rng(0)
    pixels, logits = (rng.random((3, 64)) > 0.5).astype(np.float32), rng.standard_normal((3, 64)).astype(np.float32)
    mean, log_variance = rng.standard_normal((2, 3, networks.CODE)).astype(np.float32)
    found = networks.compute_negative_elbo(*map(keras.ops.convert_to_tensor, (pixels, np.hstack([logits, mean, log_variance]))))
    distortion = -stats.bernoulli.logpmf(pixels, 1 / (1 + np.exp(-logits))).sum(axis=1)
    # The divergence of the code from the standard normal, by numerical integration.
    codes = np.linspace(-15, 15, 20_001)[:, None, None]
    code, prior = stats.norm(mean, np.exp(log_variance / 2)), stats.norm()
    divergence = integrate.trapezoid(code.pdf(codes) * (code.logpdf(codes) - prior.logpdf(codes)), codes, axis=0).sum(axis=1)
    np.testing.assert_allclose(to_numpy(found), distortion + divergence, rtol=1e-5)


# A part of the gain of whole runs: from 2.6 to 0.3, from 0.1 to 0.6 and 0.9 of accuracy, from 5 to 2.4, from 46 to 24 or 25.
@pytest.mark.parametrize(
    ("name", "entrant", "steps", "gain"),
    [
        ("quadratic", "vsgd", 100, 0.5),
        ("mnist1d-mlp", "vsgd", 100, 0.1),
        ("mnist1d-cnn", "vsgd", 100, 0.1),
        ("characters", "vsgd", 24, 1.0),
        *(("digits-vae", entrant, 100, 9.2) for entrant in ENTRANTS),
    ],
)
def test_everyone_trains_at_its_defaults(name: str, entrant: str, steps: int, gain: float) -> None:
    run = bench_of(name, entrant)
    curve = run.run(0, [ENTRANTS[entrant].base.learning_rate] * steps).curve
    assert run.task.sign * (curve[0] - curve[-1]) > gain
