"""The example that chooses a batch size, run for real in a small setting."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from research.scripts import loaded  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "choose_batch_size.py"


@pytest.fixture
def example() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with loaded(EXAMPLE) as module:
        yield module
    torch.set_num_threads(threads)


def test_command_prints_table_and_draws(tmp_path: Path) -> None:
    from matplotlib.image import imread

    output = tmp_path / "figure.png"
    small = ["--sizes", "16", "256", "--rates", "0.004", "0.016", "--seeds", "1", "--target", "1.0"]
    command = [sys.executable, str(EXAMPLE), *small, "--output", str(output)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stderr
    _, *rows, critical = result.stdout.splitlines()[:4]
    counts = [list(map(float, row.split())) for row in rows]
    assert [size for size, *_ in counts] == [16, 256]
    assert all(samples == size * steps for size, _, steps, samples in counts)
    assert counts[0][2] > counts[1][2]  # a small batch takes more steps
    assert counts[0][3] < counts[1][3]  # and fewer samples
    expected = f"{counts[0][3] / counts[1][2]:.0f}"
    assert critical == f"fewest samples over fewest steps: {expected} examples"
    assert result.stdout.splitlines()[-1] == f"wrote {output}"
    height, width, _ = imread(output).shape
    assert 600 <= height <= width <= 3000


def test_the_noise_scale_of_weights_held_still_is_near_the_truth(example: ModuleType) -> None:
    data = example.load_data()
    model = example.make_model(seed=0)
    names, params = zip(*model.named_parameters(), strict=True)

    def loss(params: tuple[object, ...], x: object, y: object) -> object:
        logits = torch.func.functional_call(model, dict(zip(names, params, strict=True)), (x,))
        return torch.nn.functional.cross_entropy(logits, y)

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(tuple(p.detach() for p in params), *data)
    each = torch.cat([grad.flatten(1) for grad in grads], dim=1)
    mean = each.mean(0)
    truth = ((each - mean).square().sum() / len(each) / mean.square().sum()).item()
    torch.manual_seed(1)
    before = [param.detach().clone() for param in params]
    assert example.measure_noise_scale(model, data) == pytest.approx(truth, rel=0.1)
    assert all(torch.equal(one, other) for one, other in zip(before, params, strict=True))


def test_what_is_not_reached_costs_infinity(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "MOST_STEPS", 2)
    assert example.count_steps(16, 0.001, 0, example.load_data(), target=0.1) == math.inf
