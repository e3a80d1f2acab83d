"""Make the models of the study's tasks and their losses, in Keras 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from experiments.networks import Positions, apply_transformer_block
from experiments.study.data import CHARACTERS, CONTEXT, WORDS

#: Size of the autoencoder's code.
CODE = 16


def make_mlp(inputs: int, hidden: Sequence[int], outputs: int) -> keras.Model:
    """Make an MLP.

    Args:
        inputs: the number of inputs.
        hidden: the widths of the hidden layers.
        outputs: the number of outputs.
    """
    start = x = keras.Input((inputs,))
    for width in hidden:
        x = layers.Dense(width, activation="relu")(x)
    return keras.Model(start, layers.Dense(outputs)(x))


def convolve(x: Any, channels: int, size: int, stride: int) -> Any:
    """Apply a convolution without padding and ReLU, as one matrix product, ten times as fast as XLA's convolutions on a CPU.

    Args:
        x: images, channels last.
        channels: of the result.
        size: height and width of the kernel.
        stride: in both directions.

    Returns:
        New images.
    """
    span = (x.shape[1] - size) // stride * stride + 1
    shifted = [x[:, i : i + span : stride, j : j + span : stride] for i in range(size) for j in range(size)]
    return layers.Dense(channels, activation="relu")(ops.concatenate(shifted, axis=-1))


def make_mnist_cnn() -> keras.Model:
    """Make a network of two convolutions for images of 784 pixels in 10 classes."""
    pixels = keras.Input((784,))
    x = convolve(layers.Reshape((28, 28, 1))(pixels), 16, size=4, stride=4)
    x = convolve(x, 24, size=3, stride=2)
    return keras.Model(pixels, layers.Dense(10)(layers.Flatten()(x)))


def make_mnist_transformer(width: int = 24, heads: int = 2) -> keras.Model:
    """Make a transformer of one block that reads an image as 16 patches of 7x7 pixels, for 10 classes.

    Args:
        width: of the vectors.
        heads: the number of heads of the attention.
    """
    pixels = keras.Input((784,))
    patches = layers.Reshape((16, 49))(layers.Permute((1, 3, 2, 4))(layers.Reshape((4, 7, 4, 7))(pixels)))
    x = apply_transformer_block(Positions()(layers.Dense(width)(patches)), heads, 2 * width, causal=False)
    x = layers.Flatten()(layers.LayerNormalization()(x))
    return keras.Model(pixels, layers.Dense(10)(x))


def make_autoencoder(width: int = 64) -> keras.Model:
    """Make an autoencoder of 784 pixels.

    Args:
        width: of the encoder's and of the decoder's hidden layer.
    """
    pixels = keras.Input((784,))
    code = layers.Dense(CODE)(layers.Dense(width, activation="relu")(pixels))
    return keras.Model(pixels, layers.Dense(784)(layers.Dense(width, activation="relu")(code)))


def make_mnist_lstm(width: int = 24) -> keras.Model:
    """Make an LSTM that reads an image row by row, for 10 classes.

    Args:
        width: of the state.
    """
    pixels = keras.Input((784,))
    x = layers.LSTM(width)(layers.Reshape((28, 28))(pixels))
    return keras.Model(pixels, layers.Dense(10)(x))


def make_character_network(size: int = 16, width: int = 128) -> keras.Model:
    """Make the language model of Bengio et al. (2003) for characters: vectors of the context, then an MLP.

    Args:
        size: of the vectors.
        width: of the two hidden layers.
    """
    context = keras.Input((CONTEXT,), dtype="int32")
    # Keras' own initial vectors are ten times smaller, which delays training.
    initial = keras.initializers.RandomNormal(stddev=0.3)
    x = layers.Flatten()(layers.Embedding(len(CHARACTERS), size, embeddings_initializer=initial)(context))
    for _ in range(2):
        x = layers.Dense(width, activation="relu")(x)
    return keras.Model(context, layers.Dense(len(CHARACTERS))(x))


def make_adapted_network(values: Sequence[Any], rank: int = 4) -> keras.Model:
    """Make a language model of characters with frozen weights and low-rank updates of its dense layers (Hu et al., 2021).

    Args:
        values: of the weights, in the order of `make_character_network`.
        rank: of the updates, which are zero at first.
    """
    model = make_character_network()
    model.set_weights(values)
    for variable in model.variables:
        variable.trainable = False
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            layer.enable_lora(rank)
    return model


class FourierFeatures(layers.Layer):
    """Sines and cosines of fixed random directions (Tancik et al., 2020).

    Args:
        count: the number of directions.
        scale: the standard deviation of their frequencies.
    """

    def __init__(self, count: int, scale: float) -> None:
        super().__init__()
        self.count = count
        self.scale = scale

    def build(self, input_shape: Any) -> None:
        """Draw the frequencies, the same ones in each model.

        Args:
            input_shape: of the coordinates.
        """
        drawn = np.random.default_rng(0).standard_normal((input_shape[-1], self.count), np.float32)
        self.frequencies = self.scale * drawn

    def call(self, x: Any) -> Any:
        """Return the features.

        Args:
            x: coordinates, a row for each point.
        """
        angles = ops.matmul(x, self.frequencies)
        return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)


def make_coordinate_network(count: int = 64, scale: float = 10.0, width: int = 64) -> keras.Model:
    """Make a network that returns the color at a place of an image.

    Args:
        count: the number of Fourier features' directions.
        scale: the standard deviation of their frequencies.
        width: of the two hidden layers.
    """
    places = keras.Input((2,))
    x = FourierFeatures(count, scale)(places)
    for _ in range(2):
        x = layers.Dense(width, activation="relu")(x)
    return keras.Model(places, layers.Dense(3)(x))


def make_word_vectors(size: int = 16) -> keras.Model:
    """Make GloVe's model of the logarithmic counts of pairs: a vector and a bias for each first and each second word.

    Args:
        size: of the vectors.
    """
    pairs = keras.Input((2,), dtype="int32")
    first, second = (layers.Embedding(WORDS, size)(pairs[:, place]) for place in range(2))
    product = ops.sum(first * second, axis=-1, keepdims=True)
    biases = [layers.Embedding(WORDS, 1, embeddings_initializer="zeros")(pairs[:, place]) for place in range(2)]
    return keras.Model(pairs, layers.Add()([product, *biases]))


def compute_squared_error(target: Any, output: Any) -> Any:
    """Compute the squared error of each example, summed over its numbers.

    Args:
        target: a row for each example.
        output: of the model, likewise.
    """
    return ops.sum(ops.square(target - output), axis=-1)


def compute_weighted_squared_error(target: Any, output: Any) -> Any:
    """Compute the weighted squared error of each example.

    Args:
        target: rows of a value and its weight.
        output: of the model, a column.
    """
    return target[:, 1] * ops.square(target[:, 0] - output[:, 0])
