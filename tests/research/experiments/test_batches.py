"""Test what augmentation may do to an image, and what a pass over the images contains."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("keras")

from experiments import batches

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(1, 256, (10, 6, 6, 3), np.uint8)  # no black
LABELS = np.arange(10, dtype=np.int32)


def views(image: np.ndarray) -> dict[bytes, tuple[int, int, bool]]:
    """Return all views that augmentation may make, and how: shifted by up to 4 pixels, black outside, and mirrored."""
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    found = {}
    for down in range(9):
        for right in range(9):
            shifted = padded[down : down + 6, right : right + 6]
            found[shifted.tobytes()] = (down, right, False)
            found[shifted[:, ::-1].tobytes()] = (down, right, True)
    assert len(found) == 2 * 81
    return found


VIEWS = [views(image) for image in IMAGES]


def test_every_shift_and_mirroring_comes_equally_often() -> None:
    rng = np.random.default_rng(0)
    seen = [VIEWS[i][each.tobytes()] for _ in range(300) for i, each in enumerate(batches.augment_images(IMAGES, rng))]
    counts = np.array([seen.count(how) for how in VIEWS[0].values()])
    # 3000 draws of 162 views: binomial, with mean 18.5 and deviation 4.3; five deviations.
    assert counts.min() > 0
    assert counts.max() < 40
    assert np.mean([mirrored for *_, mirrored in seen]) == pytest.approx(0.5, abs=0.05)


def train_batches(seed: int = 0) -> batches.TrainBatches:
    return batches.TrainBatches(IMAGES, LABELS, 3, seed, 0, 12)


def test_a_pass_has_no_image_twice_and_passes_differ() -> None:
    every = train_batches()
    passes = [[int(label) for step in range(first, first + 3) for label in every[step][1]] for first in (0, 3, 6, 9)]
    for each in passes:
        assert len(set(each)) == 9  # a batch size of 3 leaves out the tenth image
    assert len(set(map(tuple, passes))) == 4
    # Over several passes, all images occur.
    assert {label for each in passes for label in each} == set(range(10))


def test_labels_go_with_their_images_and_another_seed_gives_another_order_and_other_views() -> None:
    one, other = (train_batches(seed=seed)[4] for seed in (0, 1))
    assert not np.array_equal(one[1], other[1])
    hows = [[VIEWS[label][image.tobytes()] for image, label in zip(*each, strict=True)] for each in (one, other)]
    assert hows[0] != hows[1]
