"""What the compiled kernels share: tensors cut into chunks of equal size, and a hash of sources for their disk caches."""

from __future__ import annotations

import hashlib
import inspect
from types import ModuleType

import numpy as np

from vsgd import core, ops, outliers, posterior, rounding


def cut_chunks(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut tensors into chunks.

    Args:
        sizes: the number of elements of each tensor, int64.
        length: the number of elements of a chunk; the last chunk of a tensor may be shorter.

    Returns:
        For each chunk the index of its tensor and the index of its first element, int64.

    Example:
        >>> cut_chunks(np.array([5, 0, 2]), 4)
        (array([0, 0, 2]), array([0, 4, 0]))
    """
    counts = -(-sizes // length)
    tensors = np.repeat(np.arange(len(sizes)), counts)
    return tensors, (np.arange(len(tensors)) - (np.cumsum(counts) - counts)[tensors]) * length


def hash_sources(*modules: ModuleType) -> str:
    """Return a hash of the source of all rules and of a backend's modules.

    A compiler's disk cache sees only the file of the kernel, so the hash must be part of the cache's key.

    Args:
        modules: the backend's modules.

    Raises:
        ImportError: the package was installed without its source files.
    """
    try:
        source = "".join(map(inspect.getsource, (core, ops, outliers, posterior, rounding, *modules)))
    except OSError as error:
        raise ImportError("vsgd's compiled kernels need the package's source files (.py), but one cannot be read") from error
    return hashlib.sha256(source.encode()).hexdigest()
