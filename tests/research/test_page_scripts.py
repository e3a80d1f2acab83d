"""Run the scripts behind the pages on uncertainty and calibration, and behind the appendix, in small settings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from research.scripts import need, run

torch = pytest.importorskip("torch")
need("sklearn", "matplotlib", "tqdm")

from experiments import torch_mlp  # noqa: E402
from experiments.uncertainty import choose_batch_size, forgetting, guards, noise_scale, noise_scale_training, observer  # noqa: E402


def cells_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def run_script(script: str, output: Path, *arguments: str) -> list[list[str]]:
    """Run a script, and return the cells of the table that it prints and writes."""
    printed = run("-m", f"experiments.uncertainty.{script}", *arguments, "--output", str(output))
    assert (output / f"{script}.txt").read_text(encoding="utf-8") == printed
    assert all(figure.stat().st_size > 10_000 for figure in output.glob("*.svg"))
    return cells_of(printed)


def test_the_monitors_plots(tmp_path: Path) -> None:
    rows = run_script("monitor", tmp_path, "--epochs", "1", "--probes", "0")
    assert {each.name for each in tmp_path.glob("*.svg")} == {f"monitor{part}.svg" for part in ("", "_noise_scale", "_momenta")}
    gains = {row[0]: [float(cell) for cell in row[3:5]] for row in rows}
    # The prior's start is above nearly all squared gradients here, or far below them.
    first = float(rows[0][2])
    for name, prior in (("VSGD", 1e-8), ("VSGD, prior_strength 1e-12", 1e-12)):
        gain, variance = 1 / 31, 30 / 31 * 2 * prior / (2 * prior + 1e-4)
        expected = (variance + gain**2 * first) / (2 * variance + (gain**2 + (1 - gain) ** 2) * first)
        assert gains[name][0] == pytest.approx(expected, rel=0.25)
    assert gains["Constant VSGD, lr 0.0003"] == [0.25, 0.25]


def test_outliers(tmp_path: Path) -> None:
    rows = run_script("outliers", tmp_path, "--rates", "0.001", "--later", "1", "5")
    assert [each.name for each in tmp_path.glob("*.svg")] == ["outliers.svg"]
    noise = {row[1]: float(row[3]) for row in rows}
    assert noise["undisturbed"] == 1
    assert noise["one batch x 10,000"] > 1e4
    assert noise["one batch x 10,000, threshold 5"] < 2
    assert noise["undisturbed, threshold 5"] == pytest.approx(1, abs=0.05)


def test_costs_of_batch_sizes(tmp_path: Path) -> None:
    small = ["--sizes", "16", "256", "--rates", "0.004", "0.016", "--seeds", "1", "--target", "1.0", "--output", str(tmp_path)]
    lines = run("-m", "experiments.uncertainty.choose_batch_size", *small).splitlines()
    _, *rows, critical = lines[:4]
    (_, _, steps, samples), (_, _, few_steps, many_samples) = counts = [list(map(float, row.split())) for row in rows]
    assert [size for size, *_ in counts] == [16, 256]
    assert (samples, many_samples) == (16 * steps, 256 * few_steps)
    assert steps > few_steps  # a small batch takes more steps
    assert samples < many_samples  # and fewer samples
    assert critical == f"fewest samples over fewest steps: {samples / few_steps:.0f} examples"
    assert (tmp_path / "choose_batch_size.svg").stat().st_size > 10_000


def test_the_noise_scale_on_the_way_is_near_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    data = choose_batch_size.load_data()
    grads = noise_scale.compute_example_gradients(choose_batch_size.make_model(seed=0), *data)
    truth = noise_scale.compute_noise_scale(grads).scale.item()
    monkeypatch.setattr(choose_batch_size, "MOST_STEPS", 100)
    # At a learning rate of 0 the truth is constant, and no goal is reached.
    for _, noise in choose_batch_size.track_noise_scale(0.0, 0, data, target=1.0):
        assert noise.steps == 100
        assert noise.error < 0.2 * truth
        assert abs(noise.scale - truth) < 3 * noise.error
    # A target that is not reached costs infinity.
    monkeypatch.setattr(choose_batch_size, "MOST_STEPS", 2)
    assert choose_batch_size.count_steps(16, 0.001, 0, data, target=0.1) == math.inf


def test_the_noise_scale_of_gradients_that_are_known() -> None:
    grads = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    grads += 0.25 - grads.mean(0)
    exact = noise_scale.compute_noise_scale(grads)
    assert [exact.trace.item(), exact.squared_norm.item()] == pytest.approx(
        [grads.numpy().var(axis=0).sum(), 40 * 0.25**2], rel=1e-5
    )


def test_noise_scales_are_compared_with_the_truth() -> None:
    (row,) = noise_scale.follow("Constant VSGD", *torch_mlp.load_digits(), probes=(20,))
    truth = row.truth.scale.item()
    assert row.held.scale.item() == pytest.approx(row.last_truth.scale.item(), rel=0.15)
    *_, cells = cells_of(noise_scale.format_rows({("digits", "Constant VSGD"): [row]}))
    assert cells[:3] == ["digits", "Constant VSGD", "20"]
    assert float(cells[4]) == pytest.approx(truth, rel=0.01)


def test_the_noise_of_a_batch_that_holds_no_example_twice() -> None:
    x, y = torch_mlp.load_digits()
    torch.manual_seed(0)
    model = torch_mlp.make_model(x.shape[1])
    mean, noise = forgetting.compute_truth(model, x, y)
    grads = noise_scale.compute_example_gradients(model, x, y)
    batches = torch.stack([grads[torch.randperm(len(x))[: torch_mlp.BATCH_SIZE]].mean(0) for _ in range(400)])
    assert noise == pytest.approx((batches - mean).square().sum().item() / 400, rel=0.05)


def test_filters_are_compared_with_the_truth() -> None:
    need("mnist1d")
    found = forgetting.follow(forgetting.TRAININGS["AdamW, constant 0.001"], steps=400, looks=1)
    rows = cells_of(forgetting.format_looks({"AdamW": found}, settled=0))
    assert [row[1] for row in rows] == list(forgetting.FILTERS)
    for _, name, spread, noise, covered in rows:
        assert spread.split(" to ") == [noise] * 2
        # The noise has grown up to here, and the filter remembers its earlier size.
        if name.startswith("Constant"):
            assert 0.4 < float(noise) < 1.1
            assert float(covered.split()[0]) == pytest.approx(90, abs=10)


def test_the_truth_of_a_training_is_that_of_all_its_examples() -> None:
    need("mnist1d")
    network = observer.make_mlp()
    mean, noise = observer.compute_truth(network)
    grads = noise_scale.compute_example_gradients(network.model, network.x, network.y)
    torch.testing.assert_close(torch.cat([each.ravel() for each in mean]), grads.mean(0), rtol=1e-3, atol=1e-6)
    # Batches of one epoch vary like those that contain no example twice.
    assert noise == pytest.approx(forgetting.compute_truth(network.model, network.x, network.y)[1], rel=0.1)


def test_the_observer_is_compared_with_the_truth() -> None:
    need("mnist1d")
    looks = {("MNIST-1D, MLP", "AdamW", False): observer.follow_training("MNIST-1D, MLP", "AdamW", False, steps=600)}
    ((*names, spread, noises, within),) = cells_of(observer.format_looks(looks))
    assert names == ["MNIST-1D, MLP", "AdamW", "constant 0.003"]
    assert [float(each) for each in noises.split(" to ")] == pytest.approx([1, 1], abs=0.4)
    assert [float(each) for each in spread.split(" to ")] == pytest.approx([90, 90], abs=8)
    assert within == "yes"


def test_filters_of_synthetic_streams_are_compared_with_the_best() -> None:
    rows = cells_of(observer.format_streams(observer.follow_streams(steps=1000)))
    assert [row[0] for row in rows[::3]] == list(observer.STREAM_FILTERS)
    (middle,) = (row for row in rows if row[:2] == ["GradientObserver", "middle"])
    assert [float(cell.rstrip("%")) for cell in middle[2:5]] == pytest.approx([50, 90, 99], abs=8)
    assert [float(cell) for cell in middle[5:]] == pytest.approx([1, 1], abs=0.4)


def test_the_noise_of_all_examples_is_that_of_each_examples_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_scale_training, "CHUNK", 4)
    whole = noise_scale_training.make_transformer_training()
    training = whole._replace(x=whole.x[:10], y=whole.y[:10])
    rows = []
    for x, y in zip(training.x, training.y, strict=True):
        loss = noise_scale_training.compute_loss(training.model, x[None], y[None])
        rows.append(torch.cat([grad.ravel() for grad in torch.autograd.grad(loss, list(training.model.parameters()))]))
    grads = torch.stack(rows).numpy()
    truth = [grads.var(axis=0).sum(), (grads.mean(axis=0) ** 2).sum()]
    assert noise_scale_training.compute_truth(training) == pytest.approx(truth, rel=1e-4)


def test_the_noise_scale_of_a_training_is_compared_with_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    need("mnist1d")
    for name, window in (("LONG", 40), ("SHORT", 20)):
        monkeypatch.setattr(noise_scale_training, name, window)
    torch.manual_seed(0)
    training = noise_scale_training.make_mlp_training()._replace(steps=40)
    found = {"MLP": noise_scale_training.follow(training, windows=(40, 20))}
    steps = {window: [look.step for look in looks] for window, looks in found["MLP"].items()}
    assert steps == {40: [40], 20: [20, 40]}
    for look in (*found["MLP"][40], *found["MLP"][20]):
        assert abs(look.ratio - 1) < 3 * look.error < 1
    last = found["MLP"][20][-1]
    assert cells_of(noise_scale_training.format_looks(found))[0][5] == f"{last.ratio:.2f} ± {last.error:.2f}"
    assert [row[1] for row in cells_of(noise_scale_training.format_windows(found))] == ["40", "20"]


@pytest.mark.parametrize("name", [name for name in guards.GUARDS if name != guards.NO_GUARD])
def test_guards_cut_a_spike_to_what_their_formulas_say(name: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (100, 300)]
    guard = guards.GUARDS[name](params, guards.PLAN, 20.0)
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(301):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) * (1e4 if step == 300 else 1.0)
        found.append(guard())
    *before, last = found
    norm = guards.compute_norm(params)
    if name == "observer, skips":
        assert last is None
        return
    assert last == pytest.approx(norm / 2e5, rel=0.2)  # 20 is the norm of 400 normal numbers
    expected = {"norm clipping": 40.0, "ZClip": 20.0, "observer, scales": 4 * 20.0}
    if name in expected:
        assert norm == pytest.approx(expected[name], rel=0.1)
        assert sum(factor != 1 for factor in before) <= 0.02 * len(before)
    else:
        # The warm-up clips at 1, and from there the running means grow by at most a thousandth a step.
        assert norm <= 1.001**200 * 1.05


def test_the_observers_guards_believe_a_change_that_lasts() -> None:
    for name in guards.OBSERVERS:
        params = [torch.nn.Parameter(torch.zeros(100))]
        guard = guards.GUARDS[name](params, guards.PLAN, 10.0)
        generator = torch.Generator().manual_seed(0)
        touched = []
        for step in range(1, 301):
            params[0].grad = torch.randn(100, generator=generator) * (10.0 if step > 150 else 1.0)
            touched.append(guard() != 1)
        assert not any(touched[:150])
        assert all(touched[150:155])
        assert not any(touched[155:])


def test_guards_are_compared_on_runs_with_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "FAULTS", {name: guards.FAULTS[name] for name in (guards.NO_FAULT, "one batch x 10,000")})
    monkeypatch.setitem(guards.NAMES, "characters, transformer", (10, 50))
    plan = guards.Plan(acts=20, fault=41, falls=50, steps=60)
    norm = guards.look_at_surprises("characters, transformer", 100, plan).norm
    chosen = {name: guards.GUARDS[name] for name in (guards.NO_GUARD, guards.ZCLIP, *guards.OBSERVERS)}
    seeds = [guards.follow("characters, transformer", seed, norm, plan, chosen) for seed in (0, 1)]
    for seed in seeds:
        assert seed[guards.NO_FAULT, guards.NO_GUARD][:3] == (1, 0, 0)
        assert seed["one batch x 10,000", guards.NO_GUARD].loss > 1.1
        assert seed["one batch x 10,000", guards.NO_GUARD].caught == 0
        for name in (guards.ZCLIP, *guards.OBSERVERS):
            assert seed["one batch x 10,000", name].caught == 1
            assert seed["one batch x 10,000", name].loss == pytest.approx(seed[guards.NO_FAULT, name].loss, rel=0.1)
    rows = cells_of(guards.format_outcomes({"transformer": seeds}))
    assert [row[1:3] for row in rows] == [[fault, name] for fault in guards.FAULTS for name in chosen]
    rows = cells_of(guards.format_comparison({"transformer": seeds}))
    ratios = {(row[1], row[2]): row[3] for row in rows}
    product = math.prod(
        seed[guards.NO_FAULT, guards.OBSERVERS[0]].loss / seed[guards.NO_FAULT, guards.ZCLIP].loss for seed in seeds
    )
    assert float(ratios[guards.OBSERVERS[0], guards.NO_FAULT].split()[0]) == pytest.approx(math.sqrt(product), abs=1e-4)


def test_faults_spoil_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.ones(40, 50), torch.zeros(8)]
    guards.replace_quarter(grads, generator)
    # The two parts are orthogonal: three quarters of the gradient, and ten quarters of its norm.
    assert torch.cat([grad.ravel() for grad in grads]).norm().item() == pytest.approx(
        math.hypot(0.75, 2.5) * 2000**0.5, rel=0.05
    )
    grads = [torch.ones(40, 50), torch.zeros(8)]
    guards.overflow(grads, generator)
    assert [(grad.abs() == 65504).sum().item() for grad in grads] == [20, 0]


def test_the_tables_of_priors(tmp_path: Path) -> None:
    given = ("--steps", "100", "--seeds", "1", "--rates", "0.003", "0.01", "--data", "digits", "--output", str(tmp_path))
    printed = run("-m", "experiments.tuning.prior", *given)
    texts = [(tmp_path / f"prior_{name}.txt").read_text(encoding="utf-8") for name in ("scale", "run_away", "rates")]
    assert printed == "\n".join(texts)
    scale, run_away, rates = map(cells_of, texts)
    # Scaled losses of a real model.
    assert len(scale) == 2 * 2 * 3
    for _, kind, _, prior, *losses, apart, farthest in scale:
        plain, *scaled = map(float, losses)
        if prior == "from gradients, prior_shape 0":
            # Autograd computes the gradients in float32.
            assert set(scaled) == {plain}
            assert apart == "0"
            assert 0 < float(farthest) < 1e-4
        elif prior == "default":
            assert scaled[:2] == pytest.approx([2.3, 2.3], abs=0.1)  # the loss of ten classes without learning
            assert plain < 1
        else:
            assert scaled[:2] == pytest.approx([plain] * 2, rel=0.05)
        if kind == "VSGD" and prior != "from gradients, prior_shape 0":
            assert min(scaled[2:]) > 3 * plain
    # Least squares diverge only with the default prior.
    for kind, lr, *cells in run_away:
        if kind == "VSGD" and lr in ("0.1", "0.3"):
            default, *others = map(float, cells[::2])
            assert default > 1.5
            assert max(others) <= 1
    # The best rate is marked, and compared with that of the default, which comes first.
    assert len(rates) == 2 * 4
    best: dict[str, float] = {}
    for _, kind, prior, *losses, ratio in rates:
        (marked,) = (float(loss.strip("*")) for loss in losses if loss.startswith("**"))
        assert marked == min(float(loss.strip("*")) for loss in losses)
        best.setdefault(kind, marked)
        assert float(ratio.split()[0]) == pytest.approx(marked / best[kind], rel=0.1), prior
