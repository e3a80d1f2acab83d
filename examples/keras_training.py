"""Train a small Keras model with VSGD and AdamW on scikit-learn's digits, on any Keras backend.

    KERAS_BACKEND=jax python examples/keras_training.py

The script needs `pip install '.[keras]' scikit-learn` and one of TensorFlow, JAX and PyTorch. Both optimizers start from the
same weights and use the same batches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from vsgd.keras import VSGD

OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "VSGD": VSGD,
    "AdamW": lambda: keras.optimizers.AdamW(learning_rate=0.003),
}


class Digits(NamedTuple):
    """Images and labels of the training part and of the test part."""

    train_x: np.ndarray
    test_x: np.ndarray
    train_y: np.ndarray
    test_y: np.ndarray


def load_data() -> Digits:
    """Load the 1797 digits with pixels scaled to [-1, 1]; a fifth of each class is the test part, the same for every seed."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 8 - 1).astype("float32").reshape(-1, 8, 8, 1)
    return Digits(*train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0))


def make_model() -> keras.Model:
    """Make two convolutions and a dense head for 8x8 images in 10 classes."""
    return keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def train(name: str, data: Digits, epochs: int, seed: int) -> tuple[float, float]:
    """Train a new model.

    Args:
        name: a key of `OPTIMIZERS`.
        data: the digits.
        epochs: passes over the training data.
        seed: seed of the weights and the batches.

    Returns:
        The loss of the last epoch, and the test accuracy in percent.
    """
    keras.utils.set_random_seed(seed)
    model = make_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=OPTIMIZERS[name](), loss=loss, metrics=["accuracy"])
    history = model.fit(data.train_x, data.train_y, batch_size=64, epochs=epochs, verbose=0)
    _, accuracy = model.evaluate(data.test_x, data.test_y, verbose=0)
    return history.history["loss"][-1], 100 * accuracy


def main() -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(description="Compare VSGD with AdamW in Keras, on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training data (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the batches (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs is {arguments.epochs}, but must be at least 1")
    data = load_data()
    print(f"Keras {keras.__version__} on {keras.backend.backend()}")
    for name in OPTIMIZERS:
        start = time.perf_counter()
        loss, accuracy = train(name, data, arguments.epochs, arguments.seed)
        seconds = time.perf_counter() - start
        print(f"{name:5}  train loss {loss:.4f}  test accuracy {accuracy:.2f} %  {seconds:.1f} s")


if __name__ == "__main__":
    main()
