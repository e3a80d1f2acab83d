"""Test every claim of docs/relation-to-adam.md: Constant VSGD and Adam, AdaBelief, SGD with momentum and sign descent."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from vsgd import core

torch = pytest.importorskip("torch")

from vsgd.torch import ConstantVSGD  # noqa: E402

RULE = core.CONSTANT_VSGD
LR = 0.01
STEPS, SIZE = 200, 8
_GENERATOR = torch.Generator().manual_seed(0)
NOISE = torch.randn(STEPS, SIZE, dtype=torch.float64, generator=_GENERATOR)
#: Gradients of both signs and several sizes.
GRADS = NOISE * torch.logspace(-1, 1, SIZE, dtype=torch.float64)
#: Gradients whose mean stays away from 0, for the limits that divide by it.
STEADY = 0.3 * NOISE.clamp(-3, 3) + torch.linspace(1, 2, SIZE, dtype=torch.float64) * (-1) ** torch.arange(SIZE)

BETA1 = pytest.mark.parametrize("beta1", [0.5, 0.9, 0.99])


class Run(NamedTuple):
    """The core's results for a sequence of gradients, time first; `sigma2` is the variance that each step used."""

    direction: Any
    mu: Any
    b: Any
    sigma2: Any


def hyper_of(beta1: float, **values: float) -> core.ConstantHyperparameters:
    """Return hyperparameters whose gain is 1 - beta1; eps = 0, because the limits are those of the rule without eps."""
    return core.ConstantHyperparameters(**{"variance_ratio": beta1 / (1 - beta1), "eps": 0.0, **values})


def at_rho(rho: float, hyper: core.ConstantHyperparameters) -> core.ConstantCoefficients:
    """Return the core's coefficients for a given forgetting rate; 0 freezes b. The core accepts rho only as step ** -kappa."""
    return RULE.coefficients(1 / rho if rho else math.inf, hyper._replace(kappa=1.0))


def run(grads: Any, coefficients: Callable[[int], core.ConstantCoefficients], b: float, mu: Any = 0.0) -> Run:
    update = RULE.make_update(torch)
    state = (torch.zeros_like(grads[0]) + mu, torch.full_like(grads[0], b))
    steps = []
    for t, grad in enumerate(grads, start=1):
        c = coefficients(t)
        sigma2 = c.sigma2_per_b * state[1]
        direction, state = update(grad, state, c)
        steps.append((direction, *state, sigma2))
    return Run(*map(torch.stack, zip(*steps, strict=True)))


def run_frozen(grads: Any, beta1: float, b: float, mu: Any = 0.0) -> Run:
    c = at_rho(0.0, hyper_of(beta1))
    return run(grads, lambda _: c, b, mu)


def descend(directions: Any, lr: float) -> Any:
    params = [torch.zeros_like(directions[0])]
    for direction in directions:
        params.append(core.descend(params[-1], direction, lr, 1.0))
    return torch.stack(params[1:])


def run_theirs(grads: Any, make: Callable[[list[Any]], Any], *names: str, **state: Any) -> list[Any]:
    """Return another optimizer's parameters and named state after each step from 0; `state` is its initial state."""
    param = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = make([param])
    if state:
        optimizer.state[param].update({name: tensor.clone() for name, tensor in state.items()})
    steps = []
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        steps.append([param.detach().clone(), *(optimizer.state[param][name].clone() for name in names)])
    return [torch.stack(column) for column in zip(*steps, strict=True)]


def run_adam(grads: Any, beta1: float, beta2: float = 0.999) -> list[Any]:
    """Return Adam's parameters and two moments."""
    return run_theirs(grads, lambda params: torch.optim.Adam(params, LR, (beta1, beta2), eps=0.0), "exp_avg", "exp_avg_sq")


def before(moments: Any) -> Any:
    """Return the moments before each step: 0 before the first."""
    return torch.cat([torch.zeros_like(moments[:1]), moments[:-1]])


def ema(values: Any, beta: float, start: Any = 0.0) -> Any:
    averages = [torch.zeros_like(values[0]) + start]
    for value in values:
        averages.append(beta * averages[-1] + (1 - beta) * value)
    return torch.stack(averages[1:])


def adabelief_v(grads: Any, beta1: float, beta2: float, eps: float = 0.0) -> Any:
    """Return AdaBelief's second moment (Zhuang et al., 2020): the error is from the mean after the step; eps accumulates."""
    mean = ema(grads, beta1)
    return ema((grads - mean) ** 2 + eps / (1 - beta2), beta2)


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


# (a) mu is Adam's first moment


@BETA1
def test_mu_is_adams_first_moment(beta1: float) -> None:
    # With the default coefficients, b does not affect mu.
    hyper = hyper_of(beta1)
    ours = run(GRADS, lambda t: RULE.coefficients(t, hyper), RULE.initial_state(hyper)[1])
    assert_equal(ours.mu, run_adam(GRADS, beta1)[1])


# (b) b frozen and large: SGD with momentum


@BETA1
def test_distance_from_sgd_with_momentum_falls_as_one_over_b(beta1: float) -> None:
    make = functools.partial(torch.optim.SGD, lr=LR, momentum=beta1, dampening=beta1)
    # Torch's buffer starts as the undampened first gradient: either give torch a buffer, or start mu at the first gradient.
    for mu, buffer in ((0.0, {"momentum_buffer": torch.zeros_like(STEADY[0])}), (STEADY[0], {})):
        (theirs,) = run_theirs(STEADY, make, **buffer)
        for b in (1e4, 1e6, 1e30):
            ours = run_frozen(STEADY, beta1, b, mu)
            distance = descend(ours.direction, LR * ours.sigma2[0, 0].sqrt().item()) - theirs
            # mu / sqrt(1 + mu^2/sigma2) is mu - mu^3 / (2 sigma2), up to the next order, which is relatively mu^2/sigma2.
            expected = LR * (ours.mu**3 / (2 * ours.sigma2)).cumsum(0)
            relative = (ours.mu**2 / ours.sigma2).max().item()
            torch.testing.assert_close(distance, expected, rtol=relative, atol=1e-14)


# (c) b to 0: sign descent with momentum


@BETA1
def test_distance_from_the_sign_of_adams_first_moment_falls_as_b(beta1: float) -> None:
    mean = run_adam(STEADY, beta1)[1]
    for b in (1e-6, 1e-8, 0.0):
        ours = run_frozen(STEADY, beta1, b)
        ratio = ours.sigma2 / mean**2
        # 1 - 1 / sqrt(1 + x) = x/2 - 3 x^2/8 + ...
        distance = 1 - ours.direction * mean.sign()
        torch.testing.assert_close(distance, ratio / 2, rtol=ratio.max().item(), atol=1e-15)


# (d) rho constant: b averages the squared innovation


@BETA1
@pytest.mark.parametrize("rho", [None, 0.001, 0.3, 1.0], ids=["default", "0.001", "0.3", "1"])
def test_b_is_an_average_that_forgets_at_half_of_rho(beta1: float, rho: float | None) -> None:
    hyper = hyper_of(beta1, prior_strength=0.05)
    a = core.compute_constant_shape(hyper)
    ratio = hyper.variance_ratio
    start = 3.0
    ours = run(GRADS, lambda t: RULE.coefficients(t, hyper) if rho is None else at_rho(rho, hyper), start)
    innovation = GRADS - before(run_adam(GRADS, beta1)[1])
    expected = torch.full_like(GRADS[0], start)
    for t in range(STEPS):
        rate = ((t + 1) ** -hyper.kappa if rho is None else rho) * (2 * a - 1) / (2 * a)
        level = (hyper.prior_strength + innovation[t] ** 2 / (2 * (ratio + 1))) * 2 * a / (2 * a - 1)
        expected = (1 - rate) * expected + rate * level
        assert_equal(ours.b[t], expected)


def test_default_kappa_remembers_as_beta2_0_999_at_step_1000() -> None:
    hyper = hyper_of(0.75, prior_strength=0.0)
    ours = run(torch.ones(1, 1, dtype=torch.float64), lambda _: RULE.coefficients(1000, hyper), b=1.0, mu=1.0)
    assert ours.b.item() == pytest.approx(0.999, abs=5e-6)


def test_our_adabelief_is_pytorch_optimizers() -> None:
    theirs = pytest.importorskip("pytorch_optimizer").AdaBelief
    _, v = run_theirs(GRADS, lambda params: theirs(params, LR, (0.9, 0.99), eps=1e-4), "exp_avg_var")
    assert_equal(adabelief_v(GRADS, 0.9, 0.99, 1e-4), v)


def like_adabelief(grads: Any, beta1: float, beta2: float, eps: float = 0.0) -> tuple[Run, float]:
    """Return a run of Constant VSGD from b = 0 with AdaBelief's memory, and its 2a - 1."""
    ratio = beta1 / (1 - beta1)
    hyper = hyper_of(beta1, prior_strength=eps * (ratio + 1) / (2 * ratio**2 * (1 - beta2)))
    a = core.compute_constant_shape(hyper)
    c = at_rho((1 - beta2) * 2 * a / (2 * a - 1), hyper)
    return run(grads, lambda _: c, b=0.0), 2 * a - 1


@BETA1
@pytest.mark.parametrize("beta2", [0.6, 0.999])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_b_and_sigma2_are_adabeliefs_second_moment(beta1: float, beta2: float, eps: float) -> None:
    ratio = beta1 / (1 - beta1)
    ours, two_a_1 = like_adabelief(GRADS, beta1, beta2, eps)
    v = adabelief_v(GRADS, beta1, beta2, eps)
    assert_equal(ours.b, (two_a_1 + 1) / two_a_1 * (ratio + 1) / (2 * ratio**2) * v)
    # sigma2 comes from the previous step, because it is the predictive variance and b is updated later.
    assert_equal(ours.sigma2, before(v) / (two_a_1 * ratio))
    assert_equal(ours.direction, ours.mu / (ours.mu**2 + before(v) / (two_a_1 * ratio)).sqrt())


@BETA1
def test_root_of_the_average_is_adams_within_the_means_own(beta1: float) -> None:
    # Minkowski's inequality applies: sqrt(EMA(.^2)) is a norm of the history, and the innovation is g - mu.
    ratio = beta1 / (1 - beta1)
    ours, two_a_1 = like_adabelief(GRADS, beta1, 0.99)
    average = ours.b * two_a_1 / (two_a_1 + 1) * 2 * (ratio + 1)
    _, mean, v = run_adam(GRADS, beta1, 0.99)
    assert_equal(average, v + ema(before(mean) ** 2 - 2 * GRADS * before(mean), 0.99))
    distance = (average.sqrt() - v.sqrt()).abs()
    assert (distance <= ema(before(mean) ** 2, 0.99).sqrt() + 1e-12).all()
    assert distance.max() > 1e-3  # otherwise the bound would be trivial


def test_direction_and_average_near_adabeliefs_and_adams_as_one_over_k() -> None:
    worst, distances = [], []
    for ratio in (1e8, 1e9):
        beta1 = ratio / (ratio + 1)
        ours, two_a_1 = like_adabelief(STEADY, beta1, 0.999)
        # Leave out the first step, where v is still 0, and use v of the previous step.
        theirs = (ours.mu / before(adabelief_v(STEADY, beta1, 0.999)).sqrt())[1:]
        worst.append((ours.direction[1:] / theirs / (ratio * two_a_1) ** 0.5 - 1).abs().max())
    for ratio in (1e4, 1e5):
        ours, two_a_1 = like_adabelief(GRADS, ratio / (ratio + 1), 0.999)
        average = ours.b * two_a_1 / (two_a_1 + 1) * 2 * (ratio + 1)
        distances.append((average - run_adam(GRADS, 0.9)[2]).norm())
    assert [(first / second).item() for first, second in (worst, distances)] == pytest.approx([10, 10], rel=0.01)


# What differs for users


def vsgd_step(grad: Any, state: tuple[Any, ...], c: core.Coefficients) -> tuple[Any, tuple[Any, ...]]:
    """Return each element's momentum at this step, b_ghat / (b_g + b_ghat), and the state after it."""
    return state[2] / (state[1] + state[2]), core.VSGD.make_update(torch)(grad, state, c)[1]


def vsgd_start(hyper: core.Hyperparameters) -> tuple[Any, ...]:
    return tuple(torch.full_like(GRADS[0], value) for value in core.VSGD.initial_state(hyper))


def test_vsgd_averages_each_element_with_a_momentum_of_its_own() -> None:
    hyper = core.Hyperparameters()
    state = vsgd_start(hyper)
    for t, grad in enumerate(GRADS, start=1):
        mean = state[0]
        momentum, state = vsgd_step(grad, state, core.VSGD.coefficients(t, hyper))
        assert_equal(state[0], momentum * mean + (1 - momentum) * grad)
        if t == 1:  # all elements start at K / (K + 1)
            assert_equal(momentum, torch.full_like(mean, 30 / 31))
    assert momentum.max() - momentum.min() > 0.01


@pytest.mark.parametrize(("grad", "gain"), [(1e3, 1 / 901), (1e-9, 0.499)])
def test_first_gradient_sets_the_gain_by_its_size(grad: float, gain: float) -> None:
    hyper = core.Hyperparameters()
    grads = torch.full_like(GRADS[0], grad)
    _, state = vsgd_step(grads, vsgd_start(hyper), core.VSGD.coefficients(1, hyper))
    momentum, _ = vsgd_step(grads, state, core.VSGD.coefficients(2, hyper))
    torch.testing.assert_close(1 - momentum, torch.full_like(momentum, gain), rtol=1e-3, atol=0)


def test_both_rates_move_by_the_same_surprise() -> None:
    # Without the prior and with a = 1/2, neither rate moves at d^2 = 2 (b_g + b_ghat), whatever the gain.
    c = core.VSGD.coefficients(10, core.Hyperparameters())._replace(prior_g=0.0, prior_ghat=0.0, inverse_shape=2.0)
    b_g, b_ghat = NOISE[0].abs(), NOISE[1].abs()
    gain = b_g / (b_g + b_ghat)
    _, (_, new_g, new_ghat) = vsgd_step(GRADS[0], (torch.zeros_like(b_g), b_g, b_ghat), c)
    surprise = GRADS[0] ** 2 / 2 - (b_g + b_ghat)
    rho_1, rho_2 = 10**-0.81, 10**-0.9
    assert_equal(new_g, b_g + rho_1 * gain**2 * surprise)
    assert_equal(new_ghat, b_ghat + rho_2 * (1 - gain) ** 2 * surprise)
    # A large innovation therefore drives the gain away from this value, and a small one towards it.
    middle = rho_2 / (rho_1 + rho_2)
    away = (new_g / (new_g + new_ghat) - gain) * (gain - middle)
    assert_equal(away.sign(), surprise.sign())
    assert surprise.sign().unique().numel() == 2


@pytest.mark.parametrize(("kappa1", "kappa2"), [(0.81, 0.9), (0.81, 0.81), (0.9, 0.9)])
def test_growing_noise_is_taken_for_truth_unless_the_kappas_are_equal(kappa1: float, kappa2: float) -> None:
    hyper = core.Hyperparameters(kappa1=kappa1, kappa2=kappa2)
    noise = 0.01 * torch.randn(8000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def last_gains(grads: Any) -> Any:
        state = tuple(torch.full_like(grads[0], value) for value in core.VSGD.initial_state(hyper))
        for t, grad in enumerate(grads, start=1):
            momentum, state = vsgd_step(grad, state, core.VSGD.coefficients(t, hyper))
        return 1 - momentum

    steady = last_gains(noise)
    assert 0.35 < steady.min() < steady.max() < 0.5
    # The gradient is pure noise, whose size grows ninefold.
    gains = last_gains(noise * torch.linspace(1, 9, len(noise), dtype=torch.float64)[:, None])
    assert (gains > 0.85).all() if kappa1 < kappa2 else (gains < 0.35).all()


def test_no_step_exceeds_lr_where_adams_does() -> None:
    grads = torch.zeros(STEPS, 1, dtype=torch.float64)
    grads[-1] = 1.0
    hyper = hyper_of(0.9, eps=1e-8)
    ours = run(grads, lambda t: RULE.coefficients(t, hyper), RULE.initial_state(hyper)[1])
    assert 0.9 < ours.direction[-1].item() < 1
    (adam,) = run_theirs(grads, lambda params: torch.optim.Adam(params, LR))
    assert (adam[-2] - adam[-1]).item() > 1.3 * LR


def test_scale_of_the_gradients_matters_unless_prior_strength_follows() -> None:
    def directions(scale: float, prior_strength: float) -> Any:
        hyper = hyper_of(0.75, prior_strength=prior_strength)
        return run(scale * GRADS, lambda t: RULE.coefficients(t, hyper), RULE.initial_state(hyper)[1]).direction

    plain = directions(1.0, 1e-8)
    # The start is a * 2 gamma / (2 gamma + 1e-4), which is proportional to gamma up to 2e-4.
    torch.testing.assert_close(directions(1e-4, 1e-16), plain, rtol=2e-4, atol=0)
    assert directions(1e-4, 1e-8).norm() < 0.2 * plain.norm()


def test_literal_start_fades_slowly() -> None:
    hyper = core.Hyperparameters()
    update = core.VSGD.make_update(torch)
    grad = torch.zeros((), dtype=torch.float64)

    def sigma2_at_100(b_g: float) -> float:
        state: tuple[Any, ...] = (grad, grad + b_g, grad + hyper.variance_ratio * b_g)
        for t in range(1, 100):
            _, state = update(grad, state, core.VSGD.coefficients(t, hyper))
        _, b_g, b_ghat = state
        return (b_g * b_ghat / (b_g + b_ghat) / core.compute_shape(hyper)).item()

    # At its first step, Algorithm 1 divides gamma by the prior's shape, which is gamma: a variance of 1, or b_g = a here.
    assert sigma2_at_100(core.compute_shape(hyper)) == pytest.approx(0.02, rel=0.02)
    assert sigma2_at_100(core.VSGD.initial_state(hyper)[1]) == pytest.approx(4.2e-6, rel=0.02)


# (e) AMSGrad.


@BETA1
def test_e_at_kappa_1_nothing_is_forgotten_and_root_t_sigma_never_falls(beta1: float) -> None:
    hyper = hyper_of(beta1, prior_strength=1e-30, kappa=1.0)
    grads = GRADS.clone()
    grads[STEPS // 2 :] = 0  # so that the average falls
    found = run(grads, lambda step: RULE.coefficients(step, hyper), b=0.0)
    innovations = grads - torch.cat([torch.zeros(1, SIZE), found.mu[:-1]])
    a = core.compute_constant_shape(hyper)
    c = (2 * a - 1) / (2 * a)
    steps = torch.arange(1, STEPS + 1, dtype=torch.float64)
    later = torch.cat([(1 - c / steps).flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    weights = c / steps * later
    expected = (weights[:, None] * innovations.square()).sum(0) / c / (2 * (hyper.variance_ratio + 1))
    torch.testing.assert_close(found.b[-1], expected, rtol=1e-12, atol=0.0)
    assert weights[9] / weights[-1] == pytest.approx((10 / STEPS) ** (c - 1), rel=0.02)
    products = steps[:, None] * found.b
    assert (products[1:] >= products[:-1] * (1 - 1e-12)).all()
    assert (found.b[STEPS // 2 + 20 :].diff(dim=0) < 0).all()  # a maximum would not fall


@pytest.mark.parametrize(("kappa", "last"), [(0.9, 1022), (0.81, 38)])
def test_e_with_a_smaller_kappa_the_condition_holds_at_the_start(kappa: float, last: int) -> None:
    hyper = hyper_of(0.75, kappa=kappa)

    def keep(step: int) -> float:
        """Return the factor by which b shrinks in a step without innovation and prior."""
        c = RULE.coefficients(step, hyper)
        return float(c.keep + (c.half_rho + c.half_rho_over_ratio) * c.sigma2_per_b)

    assert next(step for step in range(2, 5000) if step * keep(step) < step - 1) == last + 1


def test_e_on_the_example_of_reddi_a_bounded_direction_ends_where_adam_does() -> None:
    def end(cls: type, **options: Any) -> float:
        param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = cls([param], **options)
        for step in range(1, 3001):
            optimizer.param_groups[0]["lr"] = 0.5 / step**0.5
            param.grad = torch.full_like(param, 3.0 if step % 3 == 1 else -1.0)
            optimizer.step()
            with torch.no_grad():
                param.clamp_(-1, 1)
        return param.item()

    betas = {"betas": (0.0, 0.1)}
    assert end(torch.optim.Adam, amsgrad=True, **betas) == pytest.approx(-1, abs=0.01)
    assert end(torch.optim.Adam, **betas) == pytest.approx(1, abs=0.01)
    for kappa in (1.0, 0.9):
        assert end(ConstantVSGD, variance_ratio=0.01, kappa=kappa) == pytest.approx(1, abs=0.01)
    assert end(ConstantVSGD) == pytest.approx(-1, abs=0.01)
