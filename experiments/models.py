"""Build the paper's networks in Keras 3, with the initial weights of their usual PyTorch versions; images are bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
from keras import layers

# PyTorch's defaults of batch normalisation; Keras' own are slower and blur more.
_NORMALISATION = {"momentum": 0.9, "epsilon": 1e-5}


def _normalise(x: Any) -> Any:
    return layers.BatchNormalization(**_NORMALISATION)(x)


def _make_he_initializer(mode: str) -> Any:
    return keras.initializers.VarianceScaling(2.0, mode=mode, distribution="untruncated_normal")


def _add_head(x: Any, classes: int, **initializers: Any) -> Any:
    return layers.Dense(classes, **initializers)(layers.GlobalAveragePooling2D()(x))


def _add_vgg(x: Any, classes: int, repeats: Sequence[int]) -> Any:
    for channels, repeat in zip((64, 128, 256, 512, 512), repeats, strict=True):
        for _ in range(repeat):
            x = layers.Conv2D(channels, 3, padding="same", kernel_initializer=_make_he_initializer("fan_out"))(x)
            x = layers.ReLU()(_normalise(x))
        x = layers.MaxPooling2D()(x)
    return _add_head(x, classes, kernel_initializer=keras.initializers.RandomNormal(stddev=0.01))


def _add_resnext(x: Any, classes: int, cardinality: int = 8, widen_factor: int = 4) -> Any:
    """Add 18 layers: a convolution, three stages of one bottleneck of 64, 128 and 256 channels times the factor, and a head."""

    def add_conv(x: Any, channels: int, size: int = 1, stride: int = 1, groups: int = 1) -> Any:
        if size > 1:
            # On both sides: Keras' "same" pads an even image on one side only.
            x = layers.ZeroPadding2D(size // 2)(x)
        options = {"groups": groups, "use_bias": False, "kernel_initializer": _make_he_initializer("fan_out")}
        return _normalise(layers.Conv2D(channels, size, strides=stride, **options)(x))

    def add_bottleneck(x: Any, channels: int, stride: int) -> Any:
        width = cardinality * channels // widen_factor
        inner = layers.ReLU()(add_conv(x, width))
        inner = layers.ReLU()(add_conv(inner, width, size=3, stride=stride, groups=cardinality))
        return layers.ReLU()(layers.Add()([add_conv(x, channels, stride=stride), add_conv(inner, channels)]))

    x = layers.ReLU()(add_conv(x, 64, size=3))
    for channels, stride in ((64, 1), (128, 2), (256, 2)):
        x = add_bottleneck(x, channels * widen_factor, stride)
    return _add_head(x, classes, kernel_initializer=_make_he_initializer("fan_in"))


def _add_convmixer(x: Any, classes: int, width: int = 256, depth: int = 8, kernel: int = 5, patch: int = 2) -> Any:
    def make_uniform(fan_in: int, *names: str) -> dict[str, Any]:
        # PyTorch's default for kernels and biases.
        limit = 1 / math.sqrt(fan_in)
        return {f"{name}_initializer": keras.initializers.RandomUniform(-limit, limit) for name in names}

    def activate(x: Any) -> Any:
        return _normalise(layers.Activation(keras.activations.gelu)(x))

    x = activate(layers.Conv2D(width, patch, strides=patch, **make_uniform(3 * patch**2, "kernel", "bias"))(x))
    for _ in range(depth):
        depthwise = layers.DepthwiseConv2D(kernel, padding="same", **make_uniform(kernel**2, "depthwise", "bias"))
        x = layers.Add()([activate(depthwise(x)), x])
        x = activate(layers.Conv2D(width, 1, **make_uniform(width, "kernel", "bias"))(x))
    return _add_head(x, classes, **make_uniform(width, "kernel", "bias"))


#: Functions that return logits from normalised images and a number of classes; `paper.MODELS` has the titles.
MODELS: dict[str, Callable[[Any, int], Any]] = {
    "vgg16": partial(_add_vgg, repeats=(2, 2, 3, 3, 3)),
    "vgg19": partial(_add_vgg, repeats=(2, 2, 4, 4, 4)),
    "resnext": _add_resnext,
    "convmixer": _add_convmixer,
}


def build_model(name: str, side: int, classes: int, mean: Sequence[float], deviation: Sequence[float]) -> keras.Model:
    """Build a network, from bytes of pixels to logits.

    Args:
        name: a key of `MODELS`.
        side: height and width of the images.
        classes: the number of logits.
        mean: of each channel over the images, where white is 1.
        deviation: likewise the standard deviation.

    Returns:
        A new model, not compiled.
    """
    inputs = keras.Input((side, side, 3), dtype="uint8")
    scale = [1 / (255 * each) for each in deviation]
    offset = [-middle / each for middle, each in zip(mean, deviation, strict=True)]
    return keras.Model(inputs, MODELS[name](layers.Rescaling(scale, offset)(inputs), classes), name=name)
