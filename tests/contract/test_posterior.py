"""Test the posterior, the noise scale and the surprise against closed forms, and that all adapters give equal answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from drivers import DRIVERS, HAS_TORCH, make_driver
from drivers.rules import RULES

import vsgd.numpy
from vsgd.posterior import (
    NoiseScale,
    Posterior,
    Scales,
    compute_posterior,
    compute_surprise,
    estimate_noise_scale,
    predict_variance,
)

kinds = pytest.mark.parametrize("kind", RULES)


#: With a separate shape, which the variances depend on.
HYPER = {"prior_strength": 1e-3, "variance_ratio": 4.0, "prior_shape": 0.7}


def stepped(kind: str, dtype: str = "float64", steps: int = 7) -> tuple[Any, list[np.ndarray]]:
    """Return a NumPy optimizer after some steps, and the gradients of the next step."""
    rng = np.random.default_rng(0)
    complex_part = 1j if dtype.startswith("complex") else 0
    shapes = [(5, 3), (4,), ()]

    def draw() -> list[np.ndarray]:
        return [np.asarray(rng.standard_normal(s) + complex_part * rng.standard_normal(s), dtype) for s in shapes]

    optimizer = getattr(vsgd.numpy, kind)(draw(), **HYPER)
    for _ in range(steps):
        optimizer.step(draw())
    return optimizer, draw()


@kinds
def test_the_variance_is_the_next_steps(kind: str) -> None:
    # A step's direction is mu / (sqrt(mu^2 + sigma^2) + eps), so sigma^2 follows from it.
    optimizer, grads = stepped(kind)
    optimizer.hyper = optimizer.hyper._replace(eps=0.0)
    optimizer.lr = 1.0
    before, params = optimizer.posterior(0), optimizer.params[0].copy()
    optimizer.step(grads)
    direction, mean = params - optimizer.params[0], optimizer.state[0]["mu_g"]
    np.testing.assert_allclose(before.variance, (mean / direction) ** 2 - mean**2, rtol=1e-6)
    # The gain is the share of the innovation that the mean takes up.
    np.testing.assert_allclose(before.mean + before.gain * (grads[0] - before.mean), mean, rtol=1e-12)


@pytest.mark.parametrize("driver", [name for name in DRIVERS if "jit" not in name and name not in ("optax-eager", "mlx")])
def test_what_is_told_is_a_copy(driver: str) -> None:
    ones = [np.ones(5, np.float32)]
    made = make_driver(driver, "VSGD", ones)
    made.step(ones)
    known = made.optimizer.posterior(0 if driver == "numpy" else made.params[0])
    before = Posterior(*map(np.array, made.posterior()[0]))
    made.step(ones)
    for one, other in zip(known, before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(made.posterior()[0].mean, before.mean)


@pytest.mark.parametrize(("kind", "lr"), [("VSGD", 1e-5), ("ConstantVSGD", 1e-4)])
def test_the_noise_scale_of_a_quadratic_is_within_a_tenth_of_the_truth(kind: str, lr: float) -> None:
    # The loss is 0.5 sum h x^2, and its gradient has noise of variance s^2 / batch. The steps are so small that the gradient
    # hardly moves within the filter's memory of 1 / gain steps, and the run is several such memories long.
    rng, n, batch, deviation = np.random.default_rng(2), 2000, 16, 4.0
    curvature, x = np.geomspace(0.1, 1.0, n), np.ones(n)
    optimizer = getattr(vsgd.numpy, kind)([x], lr=lr)
    for _ in range(6000 if kind == "VSGD" else 300):
        grad = curvature * x
        optimizer.step([grad + deviation / math.sqrt(batch) * rng.standard_normal(n)])
    scales = optimizer.noise_scale(batch_size=batch)
    truth = NoiseScale(n * deviation**2, ((curvature * x) ** 2).sum())
    assert scales.overall.trace == pytest.approx(truth.trace, rel=0.1)
    assert scales.overall.squared_norm == pytest.approx(truth.squared_norm, rel=0.1)
    assert scales.overall.scale == pytest.approx(truth.scale, rel=0.1)


@kinds
def test_pure_noise_has_no_squared_norm(kind: str) -> None:
    # The true mean is 0, so once the filter's own error is subtracted, the square is 0 on average and hence in the sum.
    rng, n = np.random.default_rng(3), 20_000
    optimizer = getattr(vsgd.numpy, kind)([np.zeros(n)], lr=0.0)
    for _ in range(1000):
        optimizer.step([rng.standard_normal(n)])
    known = optimizer.posterior(0)
    assert abs(optimizer.noise_scale(batch_size=1).overall.squared_norm) < 0.2 * (known.mean**2).sum()


@pytest.mark.parametrize("batch_size", [0, -1, math.nan, "8"])
def test_a_bad_batch_size_is_refused(batch_size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size must be a finite number > 0"):
        stepped("VSGD")[0].noise_scale(batch_size=batch_size)


@kinds
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("driver", [name for name in DRIVERS if name not in ("numpy", "keras-jit")])
def test_every_adapter_tells_the_same_of_the_same_state(driver: str, dtype: str, kind: str) -> None:
    optimizer, grads = stepped(kind, dtype)
    ours = make_driver(driver, kind, optimizer.params, promise=dtype, **HYPER)
    ours.step(grads)
    states = ({name: state[name] for name in RULES[kind].state_names} for state in optimizer.state)
    ours.write([{"param": param, **state} for param, state in zip(optimizer.params, states, strict=True)])
    for index, known in enumerate(ours.posterior()):
        for one, other in zip(known, optimizer.posterior(index), strict=True):
            assert one.dtype == dtype
            np.testing.assert_allclose(one, other, rtol=1e-5)
    if "noise scale" in DRIVERS[driver].lacks:
        return
    scales, overall = optimizer.noise_scale(batch_size=8), ours.noise_scale(8)
    expected = NoiseScale(*(sum(parts) for parts in zip(*scales.tensors, strict=True)))
    np.testing.assert_allclose(overall.trace, expected.trace, rtol=1e-5)
    np.testing.assert_allclose(overall.squared_norm, expected.squared_norm, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.surprise(grads), optimizer.surprise(grads), rtol=1e-5)


def test_optax_states_in_parts_are_put_together() -> None:
    jnp = pytest.importorskip("jax.numpy")
    optax = pytest.importorskip("optax")
    import vsgd.optax

    # With masks, one of them within a chain, the parameters' tree is reassembled.
    params = [jnp.ones(3), jnp.ones(2), jnp.ones(4)]
    make = vsgd.optax.scale_by_constant_vsgd
    solver = optax.multi_transform({"a": optax.chain(optax.identity(), make()), "b": make(9.0)}, ["a", "b", "a"])
    _, state = solver.update(params, solver.init(params))
    assert [each.mean.shape for each in vsgd.optax.posterior(state)] == [(3,), (2,), (4,)]
    assert [float(each.gain[0]) for each in vsgd.optax.posterior(state)] == [pytest.approx(g) for g in (0.25, 0.1, 0.25)]


def test_torch_says_what_it_has_no_posterior_of() -> None:
    torch = pytest.importorskip("torch")
    from vsgd.torch import VSGD

    mine, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    optimizer = VSGD([mine])
    with pytest.raises(ValueError, match=r"param of shape \(3,\) is no parameter of this optimizer"):
        optimizer.posterior(other)
    with pytest.raises(ValueError, match=r"param of shape \(2,\) has no state yet"):
        optimizer.posterior(mine)
    with pytest.raises(ValueError, match="the optimizer has no state yet"):
        optimizer.noise_scale(batch_size=1)
    assert optimizer.surprise() == {}
    assert not optimizer.state  # reading does not create state


def test_torch_keys_by_index_where_names_repeat_or_lack() -> None:
    torch = pytest.importorskip("torch")
    from vsgd.torch import VSGD

    layers = [torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)]
    optimizer = VSGD([{"params": layer.named_parameters()} for layer in layers])
    params = [param for layer in layers for param in layer.parameters()]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    scales = optimizer.noise_scale(batch_size=8)
    assert list(scales.tensors) == list(optimizer.surprise()) == [0, 1, 2, 3]
    assert scales.overall.trace.item() == pytest.approx(sum(each.trace.item() for each in scales.tensors.values()))
    optimizer.param_groups[1]["params"].pop()  # users may do this
    assert list(optimizer.surprise()) == [0, 1, 2]


def test_the_core_of_it_works_on_any_arrays() -> None:
    # Scalars, computed by hand. a = 1, so the rates are the variances.
    state, scales = (2.0, 1.0, 3.0), Scales(1.0, 1.0)
    known = compute_posterior(state, scales)
    assert known == Posterior(2.0, 0.75, 3.0, 1.0, 0.25, 4 / 0.75)
    assert known.momentum == 0.75
    assert predict_variance(state, scales) == 4.75
    assert compute_surprise(5.0, state, scales) == 9 / 4.75
    # In another unit the state describes a rescaled gradient, which is as unexpected as before.
    doubled = compute_posterior(state, scales._replace(unit=2.0))
    assert doubled == Posterior(4.0, 3.0, 12.0, 4.0, 0.25, 4 / 0.75)
    assert compute_surprise(10.0, state, scales._replace(unit=2.0)) == 9 / 4.75
    # Innovations have a variance of 4, of which w / 2 = 1/8 is the mean's own error.
    assert estimate_noise_scale(known, 10, lambda value: value) == NoiseScale(35.0, 3.5)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_of_state_in_bfloat16_the_posterior_is_float32() -> None:
    known = {}
    for stored in ("float32", "bfloat16"):
        made, rng = (
            make_driver("torch-loop", "VSGD", [np.zeros(3000, np.float32)], state_dtype=stored),
            np.random.default_rng(0),
        )
        for _ in range(20):
            made.step([rng.standard_normal(3000, np.float32)])
        known[stored] = made.optimizer.posterior(made.params[0])
    for name, wide, compact in zip(Posterior._fields, known["float32"], known["bfloat16"], strict=True):
        assert str(compact.dtype) == "torch.float32"
        if name != "snr":
            assert compact.mean().item() == pytest.approx(wide.mean().item(), rel=0.02, abs=1e-4)


def test_variances_beyond_the_root_of_the_largest_number_are_predicted() -> None:
    # The product of the largest states would overflow, and that of the smallest would vanish.
    for size in (1e-22, 1e25):
        state = tuple(np.full(3, value, np.float32) for value in (0.0, size, 3 * size))
        np.testing.assert_allclose(predict_variance(state, (1.0, 1.0)), 4.75 * size, rtol=1e-6)


def test_numpy_takes_gradients_for_the_surprise_as_for_a_step() -> None:
    optimizer, grads = stepped("VSGD", "complex128")
    real = [grad.real for grad in grads]
    assert optimizer.surprise([None, *grads[1:]])[0] is None
    assert optimizer.surprise(real) == optimizer.surprise([grad.astype(complex) for grad in real])
    with pytest.raises(ValueError, match=r"grads\[0\] has shape \(3,\), but params\[0\] has \(5, 3\)"):
        optimizer.surprise([np.ones(3), *grads[1:]])


def test_optax_has_no_surprise_of_gradients_that_do_not_fit() -> None:
    jnp = pytest.importorskip("jax.numpy")
    optax = pytest.importorskip("optax")
    import vsgd.optax
    from vsgd.optax.monitor import summarize

    state = vsgd.optax.scale_by_vsgd().init({"w": jnp.zeros(2)})
    for look in (lambda grads: vsgd.optax.surprise(grads, state), lambda grads: summarize(1, state, grads)):
        with pytest.raises(ValueError, match=r"state has arrays of shapes \[\(2,\)\] at \['w'\], but grads has \(1,\)"):
            look({"w": jnp.ones(1)})
    with pytest.raises(ValueError, match="without state of VSGD"):
        vsgd.optax.posterior(optax.adam(0.1).init([np.ones(2)]))


def test_optax_has_no_surprise_of_what_is_masked_out() -> None:
    jnp = pytest.importorskip("jax.numpy")
    optax = pytest.importorskip("optax")
    import vsgd.optax

    params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
    state = optax.masked(vsgd.optax.scale_by_vsgd(), {"a": True, "b": False}).init(params)
    told = vsgd.optax.surprise({"a": jnp.ones(3), "b": jnp.ones(2)}, state)
    alone = vsgd.optax.surprise({"a": jnp.ones(3)}, vsgd.optax.scale_by_vsgd().init({"a": params["a"]}))
    assert told["a"] == alone["a"]
    assert isinstance(told["b"], optax.MaskedNode)

    nothing = vsgd.optax.surprise({"a": None, "b": None}, state)
    assert nothing["a"] is None
    assert isinstance(nothing["b"], optax.MaskedNode)


def test_optax_states_under_vmap_have_the_posterior_of_each_member() -> None:
    jax = pytest.importorskip("jax")
    pytest.importorskip("optax")
    import jax.numpy as jnp

    import vsgd.optax
    from vsgd.optax.monitor import summarize

    # There are as many members as elements, so scales of a wrong shape would broadcast.
    grads = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 4)), jnp.float32)
    ratios = jnp.array([1.0, 3.0, 10.0, 100.0])

    def run(ratio: Any, grads: Any) -> Any:
        solver = vsgd.optax.scale_by_constant_vsgd(ratio)
        state = solver.init(grads[0])
        for grad in grads:
            _, state = solver.update(grad, state)
        return state

    together = jax.vmap(run, in_axes=(0, 1))(ratios, grads)
    alone = [run(float(ratio), grads[:, member]) for member, ratio in enumerate(ratios)]
    known, surprises = vsgd.optax.posterior(together), vsgd.optax.surprise(grads[0], together)
    for member, state in enumerate(alone):
        for ours, expected in zip(known, vsgd.optax.posterior(state), strict=True):
            np.testing.assert_allclose(ours[member], expected, rtol=1e-5)
    expected = np.mean([float(vsgd.optax.surprise(grads[0, member], state)) for member, state in enumerate(alone)])
    assert float(surprises) == pytest.approx(expected, rel=1e-5)
    gains = [float(vsgd.optax.posterior(state).gain[0]) for state in alone]
    assert summarize(3, together).overall.gain == pytest.approx(np.median(np.repeat(gains, 4)), rel=1e-5)


def test_mlx_takes_the_state_of_one_parameter() -> None:
    mx = pytest.importorskip("mlx.core")
    from vsgd.mlx import VSGD, ConstantVSGD

    optimizer, other = VSGD(), ConstantVSGD()
    other.init({"weight": mx.ones(2)})
    for state in (other.state, other.state["weight"]):
        with pytest.raises(ValueError, match=r"state has \[.*\], but must be one parameter's: \['b_g', 'b_ghat', 'mu_g'\]"):
            optimizer.posterior(state)
