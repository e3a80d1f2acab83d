"""Print what trivial predictors and Adam reach on the study's tasks: `python -m experiments.study.baselines`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments import comparison
from experiments.study import data
from experiments.study.tasks import NEW_TASKS, load_base
from experiments.tasks import Split, Task
from reporting.pages import format_table


def compute_ngram_loss(train: Split, test: Split, characters: int, order: int) -> float:
    """Compute the cross-entropy of an n-gram model with Witten and Bell's interpolation (1991).

    Args:
        train: contexts, a row for each, and next characters, both as numbers from 0.
        test: likewise.
        characters: the size of the alphabet.
        order: how many characters an n-gram has.

    Returns:
        The mean of the test's characters, in nats.
    """

    def encode(split: Split, length: int) -> NDArray[np.int64]:
        letters = np.hstack([split.x[:, split.x.shape[1] - length :], split.y[:, None]]).astype(np.int64)
        return letters @ characters ** np.arange(length, -1, -1)

    def look_up(keys: NDArray[Any], values: NDArray[Any], wanted: NDArray[Any]) -> NDArray[Any]:
        places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[places] == wanted, values[places], 0)

    probability = np.full(len(test.y), 1 / characters)
    for length in range(order):
        grams, counts = np.unique(encode(train, length), return_counts=True)
        contexts, starts, kinds = np.unique(grams // characters, return_index=True, return_counts=True)
        wanted = encode(test, length)
        total, kind = (look_up(contexts, each, wanted // characters) for each in (np.add.reduceat(counts, starts), kinds))
        mixed = (look_up(grams, counts, wanted) + kind * probability) / np.maximum(total + kind, 1)
        probability = np.where(total > 0, mixed, probability)
    return float(-np.log(probability).mean())


def _compute_squared_error(target: NDArray[Any], output: NDArray[Any]) -> float:
    return float(np.mean(np.sum(np.square(target - output), axis=1)))


def _fit_logistic_regression(train: Split) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000).fit(train.x, train.y)


def _compute_digit_accuracy(train: Split, test: Split) -> float:
    return float(_fit_logistic_regression(train).score(test.x, test.y))


def _compute_logistic_loss(train: Split, test: Split) -> float:
    from sklearn.metrics import log_loss

    return float(log_loss(test.y, _fit_logistic_regression(train).predict_proba(test.x)))


def _compute_component_error(train: Split, test: Split) -> float:
    from sklearn.decomposition import PCA

    from experiments.study.networks import CODE

    found = PCA(CODE, random_state=0).fit(train.x)
    return _compute_squared_error(test.y, found.inverse_transform(found.transform(test.x)))


def _compute_linear_error(train: Split, test: Split) -> float:
    from sklearn.linear_model import LinearRegression

    return _compute_squared_error(test.y, LinearRegression().fit(train.x, train.y).predict(test.x))


def _compute_bias_error(train: Split, test: Split) -> float:
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    # The small penalty chooses among solutions that differ by constants.
    found = make_pipeline(OneHotEncoder(handle_unknown="ignore"), Ridge(1e-3, solver="sparse_cg"))
    found.fit(train.x, train.y[:, 0], ridge__sample_weight=train.y[:, 1])
    return float(np.mean(test.y[:, 1] * np.square(test.y[:, 0] - found.predict(test.x))))


def _compute_base_loss(train: Split, test: Split) -> float:
    from experiments.networks import make_cross_entropy
    from experiments.study.networks import make_character_network

    network = make_character_network()
    network.set_weights(load_base())
    return float(make_cross_entropy()(test.y, network(test.x)))


class Baseline(NamedTuple):
    """A trivial predictor for a pair of tasks.

    Attributes:
        title: its name in the table.
        load_splits: loads the examples.
        compute: returns its metric, from the training and the test split.
        rate: Adam's highest learning rate on the tasks.
    """

    title: str
    load_splits: Callable[[], Mapping[str, Split]]
    compute: Callable[[Split, Split], float]
    rate: float


#: The baselines, by the tasks' names without the batch sizes.
BASELINES = {
    "mnist-cnn": Baseline("logistic regression", data.split_mnist, _compute_digit_accuracy, 0.005),
    "mnist-autoencoder": Baseline("principal components", data.split_mnist_images, _compute_component_error, 0.002),
    "mnist-lstm": Baseline("logistic regression", data.split_mnist, _compute_digit_accuracy, 0.01),
    "mnist-transformer": Baseline("logistic regression", data.split_mnist, _compute_digit_accuracy, 0.005),
    "bible-characters": Baseline(
        "6-gram",
        data.split_bible_characters,
        lambda train, test: compute_ngram_loss(train, test, len(data.CHARACTERS), order=6),
        0.005,
    ),
    "shakespeare-lora": Baseline("base network", data.split_hamlet, _compute_base_loss, 0.005),
    "shuttle-mlp": Baseline("logistic regression", data.split_shuttle, _compute_logistic_loss, 0.005),
    "diamonds-mlp": Baseline("linear regression", data.split_diamonds, _compute_linear_error, 0.005),
    "image-coordinates": Baseline(
        "mean color", data.split_image, lambda train, test: _compute_squared_error(test.y, train.y.mean(axis=0)), 0.005
    ),
    "bible-words": Baseline("biases only", data.split_bible_words, _compute_bias_error, 0.02),
}
#: The lengths of Adam's runs, in those of the tasks.
FACTORS = (1, 4)


def _run_adam(task: Task, rate: float) -> Iterator[float]:
    import keras

    from experiments.bench import Bench

    bench = Bench(task, keras.optimizers.Adam())
    for factor in FACTORS:
        steps = factor * task.steps
        found = bench.run(0, [rate * comparison.SCHEDULES["cosine"](step / steps) for step in range(steps)]).final
        yield float("nan") if found is None else found["test"][task.metric]


def _make_rows() -> Iterator[list[str]]:
    for name, baseline in BASELINES.items():
        splits = baseline.load_splits()
        trivial = baseline.compute(splits["train"], splits["test"])
        for task in NEW_TASKS.values():
            if task.name.startswith(f"{name}-b"):
                numbers = [trivial, *_run_adam(task, baseline.rate)]
                yield [task.name, task.metric, baseline.title, *(f"{number:.4g}" for number in numbers)]


def main() -> None:
    """Print the table of the test metrics, by trivial predictors and by Adam with a cosine schedule."""
    os.environ.setdefault("KERAS_BACKEND", "jax")  # before Keras is imported
    lengths = (f"Adam, {factor * 100}% of the steps" for factor in FACTORS)
    print(format_table(["task", "metric", "baseline", "its value", *lengths], _make_rows(), left=3))


if __name__ == "__main__":
    main()
