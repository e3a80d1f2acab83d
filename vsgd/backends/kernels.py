"""What the compiled kernels share: tensors cut into chunks of equal size, and the hash of sources for their disk caches."""

from __future__ import annotations

import hashlib
import inspect
from types import ModuleType

import numpy as np

from vsgd import core, outliers, posterior, rounding


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


def digest(*modules: ModuleType) -> str:
    """A hash of the source of every rule, and of a backend's modules.

    Args:
        modules: the backend's.

    Raises:
        ImportError: the package was installed without its source.
    """
    try:
        source = "".join(map(inspect.getsource, (core, outliers, posterior, rounding, *modules)))
    except OSError as error:
        raise ImportError("vsgd's compiled kernels need the package's source files (.py), but one cannot be read") from error
    return hashlib.sha256(source.encode()).hexdigest()
