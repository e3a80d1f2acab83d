"""How the compiled kernels share their work: tensors cut into chunks of equal size."""

from __future__ import annotations

import numpy as np


def chunks(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The chunks of tensors of these sizes.

    Args:
        sizes: elements of each tensor, int64.
        length: elements of a chunk; the last one of a tensor may have fewer.

    Returns:
        For each chunk its tensor and its first element, int64.

    Example:
        >>> chunks(np.array([5, 0, 2]), 4)
        (array([0, 0, 2]), array([0, 4, 0]))
    """
    counts = -(-sizes // length)
    tensors = np.repeat(np.arange(len(sizes)), counts)
    return tensors, (np.arange(len(tensors)) - (np.cumsum(counts) - counts)[tensors]) * length
