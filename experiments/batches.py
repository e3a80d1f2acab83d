"""Make batches that depend only on a seed and a step's number: the same on every backend, and after a restart."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

#: The largest offset of a crop from the image's middle, in pixels.
PADDING = 4

# Separate streams of random numbers for each seed.
_ORDER, _AUGMENTATION = 0, 1


def augment_images(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crop each image at random from itself with a black border, and mirror it with a probability of 1/2.

    Args:
        images: as bytes, channels last.
        rng: the source of randomness.

    Returns:
        New images of the same shape.
    """
    count, height, width, _ = images.shape
    border = (PADDING, PADDING)
    padded = np.pad(images, ((0, 0), border, border, (0, 0)))
    tops, lefts = rng.integers(0, 2 * PADDING + 1, (2, count)).tolist()
    mirrored = rng.integers(0, 2, count).tolist()
    result = np.empty_like(images)
    # Faster than gathering all pixels by index.
    for place, (top, left, flip) in enumerate(zip(tops, lefts, mirrored, strict=True)):
        crop = padded[place, top : top + height, left : left + width]
        result[place] = crop[:, ::-1] if flip else crop
    return result


class TrainBatches(keras.utils.PyDataset):
    """Augmented batches of the remaining steps, with a new order in each pass over the images.

    Args:
        images: the training images.
        labels: of each.
        batch_size: images of a batch; the rest at the end of a pass is not used.
        seed: of orders and augmentation.
        start: how many steps a run has taken already.
        stop: how many steps the run takes in all.

    Raises:
        ValueError: a batch has more images than there are.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch_size: int, seed: int, start: int, stop: int) -> None:
        super().__init__()
        if batch_size > len(images):
            raise ValueError(f"batch_size is {batch_size}, but must be at most {len(images)}, the number of training images")
        self.images, self.labels = images, labels
        self.batch_size, self.seed = batch_size, seed
        self.start, self.stop = start, stop
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def __len__(self) -> int:
        """Return the number of remaining steps."""
        return self.stop - self.start

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the batch of a step, counted from the start."""
        step = self.start + index
        chosen = self._choose_places(step)
        rng = np.random.default_rng((self.seed, _AUGMENTATION, step))
        return augment_images(self.images[chosen], rng), self.labels[chosen]

    def _choose_places(self, step: int) -> np.ndarray:
        taken, place = divmod(step, len(self.images) // self.batch_size)
        # Read the attribute once, because another thread may replace it for another pass.
        order = self._order
        if order[0] != taken:
            rng = np.random.default_rng((self.seed, _ORDER, taken))
            order = self._order = (taken, rng.permutation(len(self.images)))
        return order[1][place * self.batch_size : (place + 1) * self.batch_size]


class TestBatches(keras.utils.PyDataset):
    """All images in order, unchanged; the last batch may be smaller.

    Args:
        images: the test images.
        labels: of each.
        batch_size: images of a batch.
    """

    __test__ = False  # not a test for pytest

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch_size: int) -> None:
        super().__init__()
        self.images, self.labels, self.batch_size = images, labels, batch_size

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.images) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return a batch."""
        part = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return self.images[part], self.labels[part]
