"""The paper's networks: how many parameters they have, on paper, and where they start."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("keras")

import keras

from experiments import datasets, models, paper


def vgg(channels: Sequence[int], classes: int) -> int:
    # 3 x 3 convolutions with biases, a scale and a shift for each channel; the head sees 512 features.
    convolutions = sum(9 * before * after + after for before, after in zip((3, *channels[:-1]), channels, strict=True))
    return convolutions + 2 * sum(channels) + 512 * classes + classes


def resnext(classes: int) -> int:
    total = 9 * 3 * 64 + 2 * 64
    for before, after in ((64, 256), (256, 512), (512, 1024)):
        width = 8 * after // 4
        # Reduced, convolved in 8 groups, expanded; and the shortcut. Without biases, each normalised.
        total += before * width + 9 * width * width // 8 + width * after + before * after
        total += 2 * (width + width + after + after)
    return total + 1024 * classes + classes


def convmixer(classes: int) -> int:
    normalised = 2 * 256
    total = 2 * 2 * 3 * 256 + 256 + normalised
    total += 8 * (5 * 5 * 256 + 256 + normalised + 256 * 256 + 256 + normalised)
    return total + 256 * classes + classes


VGG16 = [*[64] * 2, *[128] * 2, *[256] * 3, *[512] * 3, *[512] * 3]
VGG19 = [*[64] * 2, *[128] * 2, *[256] * 4, *[512] * 4, *[512] * 4]
PARAMETERS = {
    "vgg16": (vgg(VGG16, 100), vgg(VGG16, 200)),
    "vgg19": (vgg(VGG19, 100), vgg(VGG19, 200)),
    "resnext": (resnext(100), resnext(200)),
    "convmixer": (convmixer(100), convmixer(200)),
}


def test_the_formulas_give_known_numbers() -> None:
    # 14,714,688 and 20,024,384 are what both VGGs' convolutions are published with.
    assert vgg(VGG16, 0) - 2 * sum(VGG16) == 14_714_688
    assert vgg(VGG19, 0) - 2 * sum(VGG19) == 20_024_384
    assert PARAMETERS == {
        "vgg16": (14_774_436, 14_825_736),
        "vgg19": (20_086_692, 20_137_992),
        "resnext": (11_086_756, 11_189_256),
        "convmixer": (617_316, 643_016),
    }


@functools.cache
def build(name: str, data: str) -> Any:
    keras.utils.set_random_seed(0)
    source = datasets.SOURCES[data]
    return models.build_model(name, source.side, source.classes, source.mean, source.deviation)


@pytest.mark.parametrize("data", datasets.SOURCES)
@pytest.mark.parametrize("name", paper.MODELS)
def test_the_number_of_parameters(name: str, data: str) -> None:
    model = build(name, data)
    counted = sum(math.prod(each.shape) for each in model.trainable_variables)
    assert counted == PARAMETERS[name][list(datasets.SOURCES).index(data)]
    assert model.output_shape == (None, datasets.SOURCES[data].classes)


def test_images_shrink_where_the_papers_networks_have_it() -> None:
    powers = (64, 32, 16, 8, 4, 2)  # other sides have a padding's border
    found = {}
    for name in paper.MODELS:
        shapes = [layer.output.shape for layer in build(name, "tiny-imagenet").layers]
        found[name] = list(dict.fromkeys(shape[1] for shape in shapes if len(shape) == 4 and shape[1] in powers))
    assert found == {"vgg16": [*powers], "vgg19": [*powers], "resnext": [64, 32, 16], "convmixer": [64, 32]}


def test_images_are_normalised_by_channel() -> None:
    source = datasets.SOURCES["cifar100"]
    assert (source.mean, source.deviation) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    layer = next(each for each in build("convmixer", "cifar100").layers if isinstance(each, keras.layers.Rescaling))
    expected = (image / 255 - np.array(source.mean)) / np.array(source.deviation)
    assert np.allclose(keras.ops.convert_to_numpy(layer(image)), expected, atol=1e-5)


def kernels(name: str) -> dict[tuple[int, ...], np.ndarray]:
    every = build(name, "cifar100").trainable_variables
    return {tuple(each.shape): keras.ops.convert_to_numpy(each) for each in every if len(each.shape) in (2, 4)}


def test_where_vgg_and_resnext_start() -> None:
    # Normal, 2 over the outputs' fan for convolutions; of so many values that the deviation is known to 1%.
    found = kernels("vgg16")
    for shape in ((3, 3, 256, 256), (3, 3, 256, 512)):
        assert found[shape].std() == pytest.approx(math.sqrt(2 / (9 * shape[-1])), rel=0.01)
    assert found[512, 100].std() == pytest.approx(0.01, rel=0.02)
    found = kernels("resnext")
    assert found[3, 3, 256, 2048].std() == pytest.approx(math.sqrt(2 / (9 * 2048)), rel=0.01)
    assert found[1024, 100].std() == pytest.approx(math.sqrt(2 / 1024), rel=0.02)


def test_where_convmixer_starts() -> None:
    found = kernels("convmixer")
    # Uniform up to one over the root of the inputs' fan.
    for shape, fan in (((5, 5, 256, 1), 25), ((1, 1, 256, 256), 256), ((2, 2, 3, 256), 12), ((256, 100), 256)):
        limit = 1 / math.sqrt(fan)
        assert 0.99 * limit < np.abs(found[shape]).max() <= limit
        assert found[shape].std() == pytest.approx(limit / math.sqrt(3), rel=0.03)
