"""Show why VSGD's defaults diverge in a long run at a constant learning rate: follow the gains, and reset some of them.

Trains the VAE of the comparison on small tasks, four times as long, and writes the table `long_run.txt` for `docs/appendix.md`:

    pip install '.[experiments]' jax
    KERAS_BACKEND=jax python -m experiments.tuning.long_run
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from experiments import comparison, tasks
from experiments.bench import Bench
from reporting.pages import format_table

OUTPUT = Path("docs/tuning")
RATE = 0.01
EVERY = 500  # steps
HIGH, LOW = 0.8, 0.05
MIDDLE = 0.3  # near most gains


class Run(NamedTuple):
    """Settings of a run.

    Attributes:
        title: of the run's row.
        entrant: the name of an entrant, with hyperparameters.
        reset: returns which gains to set to `MIDDLE`, every `EVERY` steps.
    """

    title: str
    entrant: str
    reset: Callable[[NDArray[Any]], NDArray[Any]] = lambda gain: gain > 1  # none


RUNS = (
    Run("defaults", "vsgd"),
    Run(f"defaults; gains above {HIGH:g} are set to {MIDDLE:g}", "vsgd", lambda gain: gain > HIGH),
    Run(f"defaults; gains below {LOW:g} are set to {MIDDLE:g}", "vsgd", lambda gain: gain < LOW),
    Run("`kappa1=0.9`", "vsgd:kappa1=0.9"),
    Run("`kappa1=0.9, kappa2=1`", "vsgd:kappa1=0.9,kappa2=1"),
    Run("`prior_strength=1e-6`", "vsgd:prior_strength=1e-6"),
    Run("`outlier_threshold=5`", "vsgd:outlier_threshold=5"),
)


class Look(NamedTuple):
    """Measurements of a run, every `EVERY` steps.

    Attributes:
        loss: the mean over the mini-batches since the last look; None where one loss was not finite.
        gains: of all elements, before any gain is reset.
        reset: how many gains were reset.
    """

    loss: float | None
    gains: NDArray[Any]
    reset: int


def follow_run(run: Run, steps: int, seed: int) -> Iterator[Look]:
    """Train until the last step or until the loss is not finite.

    Args:
        run: the run.
        steps: a multiple of `EVERY`.
        seed: of weights and batches.

    Yields:
        A look after every `EVERY` steps.
    """
    bench = Bench(tasks.find_task("digits-vae"), comparison.find_entrant(run.entrant).make())
    batches = bench.start(seed)
    for _ in range(steps // EVERY):
        loss = bench.train([RATE] * EVERY, batches)
        gains, count = [], 0
        for variable in bench.model.trainable_variables:
            gain = keras.ops.convert_to_numpy(bench.optimizer.posterior(variable).gain)
            gains.append(gain.ravel())
            count += set_gains(bench.optimizer, variable, run.reset(gain))
        yield Look(loss, np.concatenate(gains), count)
        if loss is None:
            return


def set_gains(optimizer: Any, variable: Any, where: NDArray[Any]) -> int:
    """Set the gain of some elements to `MIDDLE`, and keep the sum of b_g and b_ghat.

    Args:
        optimizer: a VSGD optimizer of Keras.
        variable: the parameter whose gains change.
        where: marks the elements to change.

    Returns:
        The number of changed elements.
    """
    label = variable.path.replace("/", "_")
    state = {each.path.rpartition("/")[2]: each for each in optimizer.variables}
    b_g, b_ghat = state[f"{label}_b_g"], state[f"{label}_b_ghat"]
    old_g, old_ghat = map(keras.ops.convert_to_numpy, (b_g, b_ghat))
    total = old_g + old_ghat
    b_g.assign(np.where(where, MIDDLE * total, old_g))
    b_ghat.assign(np.where(where, (1 - MIDDLE) * total, old_ghat))
    return int(where.sum())


def make_rows(steps: int, looks: Sequence[int], seeds: Sequence[int]) -> Iterator[list[str]]:
    """Yield a table row for each run and seed.

    Args:
        steps: of each run.
        looks: the steps to report, multiples of `EVERY`.
        seeds: of the runs.
    """
    for run in RUNS:
        for seed in seeds:
            found = list(follow_run(run, steps, seed))
            reported = [found[look // EVERY - 1] if look // EVERY <= len(found) else None for look in looks]
            losses = ["diverged" if each is None or each.loss is None else f"{each.loss:.4g}" for each in reported]
            parts = ["" if each is None else f"{100 * np.mean(each.gains > HIGH):.2g}" for each in reported]
            count = sum(each.reset for each in found)
            yield [run.title, str(seed), *losses, *parts, str(count) if count else ""]


def main() -> None:
    """Run the command line: write the table."""
    parser = argparse.ArgumentParser(description="Follow VSGD's gains in a long run.")
    parser.add_argument("--steps", type=int, default=8000, help="of each run (default: %(default)s)")
    parser.add_argument("--looks", type=int, nargs="+", default=[1000, 2000, 4000, 8000], help="steps to report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201], help="of the runs (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    heads = ["VSGD", "seed"]
    heads += [f"{what}, step {look}" for what in ("train loss", f"% of gains above {HIGH:g}") for look in arguments.looks]
    text = format_table([*heads, "gains set"], make_rows(arguments.steps, arguments.looks, arguments.seeds)) + "\n"
    (arguments.output / "long_run.txt").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
