"""Test the paper's networks, by their number of parameters and their initial values, and what each optimizer is."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("keras")

import keras

from experiments import datasets, models, paper
from experiments.optimizers import OPTIMIZERS

# The networks' parameters for C classes. The first numbers of both VGGs are published for their convolutions; each channel adds
# a scale and a shift. ResNeXt's blocks have no biases, ConvMixer's do.
PARAMETERS = {
    "vgg16": lambda classes: 14_714_688 + 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512) + 513 * classes,
    "vgg19": lambda classes: 20_024_384 + 2 * (2 * 64 + 2 * 128 + 4 * 256 + 8 * 512) + 513 * classes,
    "resnext": lambda classes: 9 * 3 * 64 + 2 * 64 + sum(map(count_block, (64, 256, 512))) + 1025 * classes,
    "convmixer": lambda classes: 13 * 256 + 8 * (26 * 256 + 257 * 256 + 4 * 256) + 2 * 256 + 257 * classes,
}


def count_block(before: int) -> int:
    """Return the parameters of ResNeXt's block: reduced, convolved in 8 groups, expanded, and the shortcut; each normalised."""
    after = 256 if before == 64 else 2 * before
    width = 2 * after
    return before * width + 9 * width * width // 8 + width * after + before * after + 2 * (2 * width + 2 * after)


@functools.cache
def build(name: str, data: str) -> Any:
    keras.utils.set_random_seed(0)
    source = datasets.SOURCES[data]
    return models.build_model(name, source.side, source.classes, source.mean, source.deviation)


@pytest.mark.parametrize("data", datasets.SOURCES)
@pytest.mark.parametrize("name", paper.MODELS)
def test_the_number_of_parameters(name: str, data: str) -> None:
    model, classes = build(name, data), datasets.SOURCES[data].classes
    assert sum(math.prod(each.shape) for each in model.trainable_variables) == PARAMETERS[name](classes)
    assert model.output_shape == (None, classes)


def test_images_shrink_where_the_papers_networks_have_it() -> None:
    powers = (64, 32, 16, 8, 4, 2)  # other sides include the padding's border
    found = {}
    for name in paper.MODELS:
        shapes = [layer.output.shape for layer in build(name, "tiny-imagenet").layers]
        found[name] = list(dict.fromkeys(shape[1] for shape in shapes if len(shape) == 4 and shape[1] in powers))
    assert found == {"vgg16": [*powers], "vgg19": [*powers], "resnext": [64, 32, 16], "convmixer": [64, 32]}


def test_images_are_normalised_by_channel() -> None:
    source = datasets.SOURCES["cifar100"]
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    layer = next(each for each in build("convmixer", "cifar100").layers if isinstance(each, keras.layers.Rescaling))
    expected = (image / 255 - np.array(source.mean)) / np.array(source.deviation)
    assert np.allclose(keras.ops.convert_to_numpy(layer(image)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "deviation"),
    [
        # Normal, with variance 2 over the outputs' fan for convolutions; the values determine the deviation to 1%.
        ("vgg16", (3, 3, 256, 256), math.sqrt(2 / (9 * 256))),
        ("vgg16", (3, 3, 256, 512), math.sqrt(2 / (9 * 512))),
        ("vgg16", (512, 100), 0.01),
        ("resnext", (3, 3, 256, 2048), math.sqrt(2 / (9 * 2048))),
        ("resnext", (1024, 100), math.sqrt(2 / 1024)),
        # Uniform, up to one over the root of the inputs' fan.
        *(
            ("convmixer", shape, 1 / math.sqrt(3 * fan))
            for shape, fan in (((5, 5, 256, 1), 25), ((1, 1, 256, 256), 256), ((2, 2, 3, 256), 12), ((256, 100), 256))
        ),
    ],
)
def test_where_the_networks_start(name: str, shape: tuple[int, ...], deviation: float) -> None:
    *_, kernel = (each for each in build(name, "cifar100").trainable_variables if tuple(each.shape) == shape)
    values = keras.ops.convert_to_numpy(kernel)
    assert values.std() == pytest.approx(deviation, rel=0.03 if name == "convmixer" else 0.02 if len(shape) == 2 else 0.01)
    if name == "convmixer":
        assert 0.99 < np.abs(values).max() / (math.sqrt(3) * deviation) <= 1


# The optimizers

CLASSES = {"vsgd": "VSGD", "constant-vsgd": "ConstantVSGD", "adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "lion": "Lion"}


def test_each_is_made_with_its_defaults_or_what_is_given() -> None:
    for name, each in OPTIMIZERS.items():
        made = each.make()
        assert type(made).__name__ == CLASSES[name]
        assert float(made.learning_rate) == pytest.approx(each.learning_rate)
    assert [OPTIMIZERS["sgd"].make(**given).momentum for given in ({}, {"momentum": 0.5})] == [0.9, 0.5]
