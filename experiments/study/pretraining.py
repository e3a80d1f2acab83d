"""Train the language model that the low-rank updates start from: `python -m experiments.study.pretraining`."""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from experiments import comparison
from experiments.study import data
from experiments.study.tasks import BASE, NEW_TASKS
from experiments.tasks import make_labelled_data

#: Of the training.
STEPS, BATCH_SIZE, RATE = 10_000, 512, 0.003


def main() -> None:
    """Train on the whole King James text, print the test's loss, and write the weights."""
    os.environ.setdefault("KERAS_BACKEND", "jax")  # before Keras is imported
    import keras

    from experiments.bench import Bench

    task = dataclasses.replace(
        NEW_TASKS[f"bible-characters-b{BATCH_SIZE}"],
        steps=STEPS,
        load_data=lambda: make_labelled_data(data.split_bible_characters(whole=True), BATCH_SIZE, shown=1000),
    )
    bench = Bench(task, keras.optimizers.Adam())
    outcome = bench.run(0, [RATE * comparison.SCHEDULES["cosine"](step / STEPS) for step in range(STEPS)])
    print(outcome.final)
    # Half precision keeps the file small; the task's base network has exactly these weights.
    np.savez_compressed(BASE, *(each.astype(np.float16) for each in bench.model.get_weights()))


if __name__ == "__main__":
    main()
