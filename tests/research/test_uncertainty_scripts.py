"""The scripts that make the figures and tables of `docs/uncertainty.md`, run in small settings."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from experiments import torch_mlp  # noqa: E402
from experiments.uncertainty import noise_scale  # noqa: E402

ROOT = Path(__file__).parents[2]


def run(script: str, output: Path, *arguments: str) -> list[list[str]]:
    """Run a script, and return the cells of the table that it prints and writes."""
    from matplotlib.image import imread

    command = [sys.executable, "-m", f"experiments.uncertainty.{script}", *arguments, "--output", str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stderr
    assert (output / f"{script}.txt").read_text(encoding="utf-8") == result.stdout
    for figure in output.glob("*.png"):
        height, width, _ = imread(figure).shape
        assert 500 <= min(height, width) <= max(height, width) <= 2000
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()[2:]]


def test_the_monitors_plots(tmp_path: Path) -> None:
    rows = run("monitor", tmp_path, "--epochs", "1", "--probes", "0")
    assert {each.name for each in tmp_path.glob("*.png")} == {f"monitor{part}.png" for part in ("", "_noise_scale", "_momenta")}
    gains = {row[0]: [float(cell) for cell in row[3:5]] for row in rows}
    # The prior's start is above nearly all squared gradients here, or far below.
    first = float(rows[0][2])
    for name, prior in (("VSGD", 1e-8), ("VSGD, prior_strength 1e-12", 1e-12)):
        gain, variance = 1 / 31, 30 / 31 * 2 * prior / (2 * prior + 1e-4)
        expected = (variance + gain**2 * first) / (2 * variance + (gain**2 + (1 - gain) ** 2) * first)
        assert gains[name][0] == pytest.approx(expected, rel=0.25)
    assert gains["Constant VSGD, lr 0.0003"] == [0.25, 0.25]


def test_outliers(tmp_path: Path) -> None:
    rows = run("outliers", tmp_path, "--rates", "0.001", "--later", "1", "5")
    assert [each.name for each in tmp_path.glob("*.png")] == ["outliers.png"]
    noise = {row[1]: float(row[3]) for row in rows}
    assert noise["undisturbed"] == 1
    assert noise["one batch x 10,000"] > 1e4
    assert noise["one batch x 10,000, threshold 5"] < 2
    assert noise["undisturbed, threshold 5"] == pytest.approx(1, abs=0.05)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_noise_scale_of_gradients_that_are_known() -> None:
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(200, 40, generator=generator)
    grads += 0.25 - grads.mean(0)
    trace, squared_norm = grads.numpy().var(axis=0).sum(), 40 * 0.25**2
    exact, pairs = noise_scale.compute_noise_scale(grads), noise_scale.estimate_from_two_batch_sizes(grads, generator)
    assert exact.trace.item() == pytest.approx(trace, rel=1e-5)
    assert exact.squared_norm.item() == pytest.approx(squared_norm, rel=1e-5)
    assert pairs.trace.item() == pytest.approx(trace, rel=0.1)
    assert pairs.squared_norm.item() == pytest.approx(squared_norm, rel=0.1)


@pytest.mark.usefixtures("one_thread")
def test_noise_scales_are_set_beside_the_truth() -> None:
    data = torch_mlp.load_digits()
    (row,) = noise_scale.follow("Constant VSGD", *data, probes=(20,))
    truth, pairs, held = row.truth.scale.item(), row.pairs.scale.item(), row.held.scale.item()
    assert pairs == pytest.approx(truth, rel=0.15)
    assert held == pytest.approx(row.last_truth.scale.item(), rel=0.15)
    text = noise_scale.format_rows({("digits", "Constant VSGD"): [row]})
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    assert cells[:3] == ["digits", "Constant VSGD", "20"]
    assert float(cells[4]) == pytest.approx(truth, rel=0.01)


@pytest.mark.usefixtures("one_thread")
def test_clipping_lowers_the_trace_and_the_squared_norm_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_scale, "CLIPS", (math.inf, 0.1))
    text = noise_scale.format_clipped_rows({"digits": torch_mlp.load_digits()}, (20,))
    rows = [line.split("|")[3:-1] for line in text.splitlines()[2:]]
    (whole, *free), (clip, *cut) = ([cell.strip() for cell in row] for row in rows)
    assert (whole, clip) == ("not", "0.1")
    assert [float(cell) for cell in free] == pytest.approx([1, 1, 1], abs=0.1)
    trace, squared_norm, scale = map(float, cut)
    assert trace < 0.02
    assert squared_norm < 0.02
    assert scale == pytest.approx(1, abs=0.15)


def test_mnist_1d_is_made_on_the_spot() -> None:
    pytest.importorskip("mnist1d")
    x, y = torch_mlp.DATA["MNIST-1D"]()
    assert x.shape == (4000, 40)
    assert torch.equal(y.unique(), torch.arange(10))
    assert torch.equal(x, torch_mlp.DATA["MNIST-1D"]()[0])


def test_without_its_package_mnist_1d_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mnist1d", None)
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(SystemExit, match=r"^MNIST-1D needs mnist1d: pip install '\.\[examples\]', or choose --data digits$"):
        torch_mlp.DATA["MNIST-1D"]()
