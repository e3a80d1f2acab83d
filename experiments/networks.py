"""Make the models of the small tasks and their losses, in Keras 3."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

#: Size of the VAE's code.
CODE = 8


class Quadratic(layers.Layer):
    """The risk 1/2 sum(curvature w^2) of a point w, plus noise . w for each noise in the input: gradients with known noise.

    Args:
        curvatures: eigenvalues of the Hessian.
    """

    def __init__(self, curvatures: NDArray[np.float32]) -> None:
        super().__init__()
        self.curvatures = curvatures

    def build(self, input_shape: Any) -> None:
        """Create the point, drawn from the standard normal distribution.

        Args:
            input_shape: of the noise.
        """
        self.point = self.add_weight((len(self.curvatures),), initializer=keras.initializers.RandomNormal(stddev=1.0))

    def call(self, noise: Any) -> Any:
        """Compute the risk plus the noise's part.

        Args:
            noise: of the gradient, a row for each example.
        """
        risk = 0.5 * ops.sum(ops.multiply(self.curvatures, ops.square(self.point)))
        return risk + ops.matmul(noise, ops.expand_dims(self.point, 1))


def make_quadratic(curvatures: NDArray[np.float32]) -> keras.Model:
    """Make a model with only a `Quadratic`.

    Args:
        curvatures: eigenvalues of the Hessian.
    """
    inputs = keras.Input((len(curvatures),))
    return keras.Model(inputs, Quadratic(curvatures)(inputs))


def return_output(target: Any, output: Any) -> Any:
    """Return the model's output, a loss that the model computes itself.

    Args:
        target: not used.
        output: of the model.
    """
    return output


def make_cross_entropy() -> keras.losses.Loss:
    """Make the cross-entropy of logits."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_mlp() -> keras.Model:
    """Make an MLP with two hidden layers of 100, for signals of 40 samples in 10 classes."""
    inputs = keras.Input((40,))
    x = layers.Dense(100, activation="relu")(inputs)
    x = layers.Dense(100, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def make_cnn() -> keras.Model:
    """Make a network of three convolutions with 25 channels, for signals of 40 samples in 10 classes."""
    inputs = keras.Input((40,))
    x = layers.Reshape((40, 1))(inputs)
    for size in (5, 3, 3):
        x = layers.Conv1D(25, size, strides=2, padding="same", activation="relu")(x)
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))


def make_conv_mixer(width: int = 32, depth: int = 2) -> keras.Model:
    """Make a ConvMixer (Trockman and Kolter, 2022) for 8x8 images in 10 classes, with patches of 2x2 pixels.

    Args:
        width: the number of channels.
        depth: how many times the network mixes places, then channels.
    """

    def activate(x: Any) -> Any:
        # Keras' momentum of 0.99 suits more steps than a small task takes.
        return layers.BatchNormalization(momentum=0.9)(layers.Activation("gelu")(x))

    inputs = keras.Input((8, 8, 1))
    x = activate(layers.Conv2D(width, 2, strides=2)(inputs))
    for _ in range(depth):
        x = layers.Add()([x, activate(layers.DepthwiseConv2D(3, padding="same")(x))])
        x = activate(layers.Conv2D(width, 1)(x))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


class Positions(layers.Layer):
    """Adds a learned vector at each place."""

    def build(self, input_shape: Any) -> None:
        """Create the vectors.

        Args:
            input_shape: of the input.
        """
        self.vectors = self.add_weight(input_shape[1:], initializer=keras.initializers.RandomNormal(stddev=0.02))

    def call(self, x: Any) -> Any:
        """Add the vectors.

        Args:
            x: a vector for each place.
        """
        return x + self.vectors


def apply_transformer_block(x: Any, heads: int, hidden: int, causal: bool) -> Any:
    """Apply attention and an MLP, each normalized before and added to its input.

    Args:
        x: a vector for each place.
        heads: the number of heads of the attention.
        hidden: the width of the MLP's hidden layer.
        causal: whether a place attends to no later one.

    Returns:
        New vectors.
    """
    width = x.shape[-1]
    y = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=causal)])
    y = layers.LayerNormalization()(x)
    return layers.Add()([x, layers.Dense(width)(layers.Dense(hidden, activation="gelu")(y))])


def make_transformer(characters: int, context: int, width: int = 64, depth: int = 2, heads: int = 4) -> keras.Model:
    """Make a causal transformer, normalized before each sublayer, that returns logits of the next character at each place.

    Args:
        characters: the size of the alphabet.
        context: the number of places.
        width: of the vectors.
        depth: the number of blocks.
        heads: the number of heads of each attention.
    """
    inputs = keras.Input((context,), dtype="int32")
    initial = keras.initializers.RandomNormal(stddev=0.02)
    x = Positions()(layers.Embedding(characters, width, embeddings_initializer=initial)(inputs))
    for _ in range(depth):
        x = apply_transformer_block(x, heads, 4 * width, causal=True)
    return keras.Model(inputs, layers.Dense(characters)(layers.LayerNormalization()(x)))


def make_vae() -> keras.Model:
    """Make a variational autoencoder of 64 pixels; its inputs are pixels and the noise of the code."""
    pixels, noise = keras.Input((64,)), keras.Input((CODE,))
    x = layers.Dense(128, activation="relu")(pixels)
    mean, log_variance = layers.Dense(CODE)(x), layers.Dense(CODE)(x)
    deviation = layers.Lambda(lambda each: ops.exp(each / 2))(log_variance)
    code = layers.Add()([mean, layers.Multiply()([deviation, noise])])
    logits = layers.Dense(64)(layers.Dense(128, activation="relu")(code))
    return keras.Model([pixels, noise], layers.Concatenate()([logits, mean, log_variance]))


def compute_negative_elbo(pixels: Any, output: Any) -> Any:
    """Compute the negative evidence lower bound of each image in nats, for pixels that are probabilities.

    Args:
        pixels: from 0 to 1.
        output: of the model of `make_vae`: logits of the pixels, mean and logarithmic variance of the code.
    """
    logits, mean, log_variance = output[:, :64], output[:, 64 : 64 + CODE], output[:, 64 + CODE :]
    distortion = ops.sum(ops.softplus(logits) - pixels * logits, axis=1)
    rate = 0.5 * ops.sum(ops.square(mean) + ops.exp(log_variance) - 1 - log_variance, axis=1)
    return distortion + rate
