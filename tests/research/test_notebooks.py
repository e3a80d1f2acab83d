"""The notebooks: what is stored in them, and each executed for real in a kernel of its own."""

from __future__ import annotations

import functools
import json
import re
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import pytest
from research.scripts import loaded

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
FRAMEWORKS = {"jax": ("jax", "optax"), "keras": ("keras",), "torch": ("torch",)}
PACKAGES = ("nbclient", "ipykernel", "matplotlib", "sklearn")

# Run in a notebook's own kernel after its last cell, to see what is in its variables.
PROBES = {
    "jax": """
        accuracies = [100 * (said[name][best].argmax(-1) == test_y).mean() for name, best in chosen.items()]
        same = jax.tree.leaves(jax.tree.map(np.array_equal, resumed, run))
        counts = resumed[1][0].count, run[1][0].count, steps
        noise = {look.step: look.overall.noise_scale for look in constant_looks}
        probe = {
            "noise scale and truth": [(noise[step], scale) for step, scale in truth.items()],
            "found no gradient": np.mean([look.overall.noise_squared_norm <= 0 for look in looks]),
            "default prior": np.asarray(defaults).tolist(),
            "prior from gradients": np.asarray(fitted).tolist(),
        }
    """,
    "keras": """
        accuracies = [100 * history["val_accuracy"][-1] for history in curves.values()]
        optimizers = resumed.optimizer, model.optimizer
        pairs = [*zip(resumed.weights, model.weights), *zip(*(each.variables for each in optimizers))]
        same = [np.array_equal(*map(ops.convert_to_numpy, pair)) for pair in pairs]
        counts = *(ops.convert_to_numpy(each.iterations) for each in optimizers), steps

        # The norm of a gradient is how fast the loss rises along it.
        grads = next(gradients())
        norm = np.sqrt(sum(np.square(grad).sum(dtype="float64") for grad in grads))
        moved = compiled(VSGD())
        start = moved.get_weights()

        def loss_at(distance):
            moved.set_weights([weight + distance / norm * grad for weight, grad in zip(start, grads)])
            return moved.evaluate(train_x[:BATCH_SIZE], train_y[:BATCH_SIZE], batch_size=BATCH_SIZE, verbose=0)[0]

        probe = {"norm": norm, "slope": (loss_at(0.02) - loss_at(-0.02)) / 0.04}
    """,
    "torch": """
        accuracies = list(accuracies.values())
        states = [optimizer.state_dict()["state"] for optimizer in (resumed["optimizer"], vsgd)]
        pairs = [(states[0][key][name], each) for key, state in states[1].items() for name, each in state.items()]
        pairs += zip(resumed["model"].parameters(), model.parameters())
        same = [torch.equal(*pair) for pair in pairs]
        counts = *(state[0]["step"] for state in states), EPOCHS * steps_per_epoch
        probe = {
            "signal to noise": {name: summary.snr_50 for name, summary in looks[-1].tensors.items()},
            "surprises": (usual, odd),
        }
    """,
}
REPORT = """
import json
probe |= {"accuracies": accuracies, "same": same, "counts": counts}
print(json.dumps(probe, default=lambda number: number.item()))
"""


class Execution(NamedTuple):
    cells: list[Any]
    probe: dict[str, Any]


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def stored(name: str) -> list[Any]:
    return code_cells(json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")))


@functools.cache
def execution(name: str) -> Execution:
    missing = [package for package in (*FRAMEWORKS[name], *PACKAGES) if find_spec(package) is None]
    if missing:
        pytest.skip(f"the notebook needs what is not installed: {', '.join(missing)}")
    import nbformat

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(dedent(PROBES[name]) + REPORT))
    with loaded(FOLDER / "execute.py") as script:
        script.execute(notebook)
    *cells, last = code_cells(notebook)
    return Execution(cells, json.loads(next(output.text for output in last.outputs if output.name == "stdout")))


every_notebook = pytest.mark.parametrize("name", FRAMEWORKS)


def test_these_are_all() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(FRAMEWORKS)


@every_notebook
def test_what_is_stored_is_one_execution_of_all_cells_without_a_complaint(name: str) -> None:
    cells = stored(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output["output_type"], output.get("name")) for cell in cells for output in cell["outputs"]}
    assert kinds == {("stream", "stdout"), ("display_data", None)}


@every_notebook
def test_what_is_stored_is_small_and_tells_no_path_and_no_time(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert not re.search(r"/home/|/root/|/tmp/|/Users/|[A-Z]:\\\\|site-packages|iopub", text)


@every_notebook
def test_an_execution_shows_what_is_stored(name: str) -> None:
    assert shown(execution(name).cells) == shown(stored(name))


def shown(cells: list[Any]) -> list[list[Any]]:
    """Text but for numbers and spaces, and kinds of pictures; of what another machine may complain is not compared."""
    return [[_shown(output) for output in cell["outputs"] if output.get("name") != "stderr"] for cell in cells]


def _shown(output: Any) -> Any:
    if output["output_type"] != "stream":
        return sorted(output["data"])
    return re.sub(r"-?\d+(\.\d+)?(e[-+]\d+)?", "#", "".join(output["text"])).split()


@every_notebook
def test_all_optimizers_learn_the_digits(name: str) -> None:
    accuracies = execution(name).probe["accuracies"]
    assert len(accuracies) >= 2
    # Chance is 10 %; the least that was seen is 94 %.
    assert all(85 < accuracy <= 100 for accuracy in accuracies)


@every_notebook
def test_the_resumed_run_ends_where_the_whole_one_does(name: str) -> None:
    probe = execution(name).probe
    assert len(probe["same"]) > 10
    assert all(probe["same"])
    resumed, whole, steps = probe["counts"]
    assert resumed == whole == steps


def test_in_torch_the_biases_before_batch_norm_have_no_signal_and_wrong_labels_surprise() -> None:
    probe = execution("torch").probe
    ratios = probe["signal to noise"]
    dark = {ratios.pop(name) for name in ("conv1.bias", "conv2.bias")}
    assert max(dark) < 1e-4 * min(ratios.values())
    usual, odd = probe["surprises"]
    assert odd > 10 * usual


def test_in_keras_a_step_of_sgd_shows_the_gradient() -> None:
    probe = execution("keras").probe
    # In float32, a central difference of this width is right to a few in a thousand.
    assert probe["norm"] == pytest.approx(probe["slope"], rel=0.02)


def test_in_jax_the_noise_scale_is_near_the_truth_for_constant_vsgd_alone() -> None:
    probe = execution("jax").probe
    pairs = probe["noise scale and truth"]
    assert len(pairs) > 5
    assert all(1 / 4 < scale / truth < 4 for scale, truth in pairs)
    assert probe["found no gradient"] > 0.5


def test_in_jax_the_default_prior_fits_one_scale_of_the_loss_and_one_from_gradients_fits_all() -> None:
    probe = execution("jax").probe
    small, own, large = probe["default prior"]
    assert own < 0.2
    assert min(small, large) > 10 * own
    assert max(probe["prior from gradients"]) < 0.2
    # Between powers of two the last bits differ, and the training amplifies them.
    assert max(probe["prior from gradients"]) == pytest.approx(min(probe["prior from gradients"]), rel=0.01)
