"""Train a small Keras model with VSGD on scikit-learn's digits, on any Keras backend.

    pip install '.[keras]' scikit-learn tqdm jax
    KERAS_BACKEND=jax python examples/keras_training.py

With TensorFlow or PyTorch installed, `KERAS_BACKEND=tensorflow` or `torch` runs the same program.
"""

from __future__ import annotations

import argparse

import keras
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from vsgd.keras import ConstantVSGD


def make_model() -> keras.Model:
    """Make two convolutions and a dense head for 8x8 images in 10 classes."""
    return keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="Train a small Keras model with VSGD on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training data (default: %(default)s)")
    epochs = parser.parse_args().epochs

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 8 - 1).astype("float32").reshape(-1, 8, 8, 1)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)

    keras.utils.set_random_seed(0)
    model = make_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=ConstantVSGD(0.008), loss=loss, metrics=["accuracy"])
    with tqdm(total=epochs, unit="epoch") as bar:
        progress = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: bar.update())
        model.fit(train_x, train_y, batch_size=64, epochs=epochs, callbacks=[progress], verbose=0)
    _, accuracy = model.evaluate(test_x, test_y, verbose=0)
    print(f"Keras {keras.__version__} on {keras.backend.backend()}: test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
