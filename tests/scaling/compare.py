"""Compare two arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def apart(one: Any, other: Any, whole: Any = None) -> float:
    """Return the largest difference of two arrays, relative to the largest value of `other`, or of the `whole` it is part of.

    Return infinity if a difference is not finite, or if the shapes or dtypes differ.
    """
    # Keras counts steps in int64 on TensorFlow, in int32 elsewhere.
    if one.shape != other.shape or not (one.dtype == other.dtype or one.dtype.kind == other.dtype.kind == "i"):
        return math.inf
    one, other, whole = (np.asarray(each).astype(np.complex128) for each in (one, other, other if whole is None else whole))
    difference = float(np.abs(one - other).max(initial=0.0))
    if difference == 0:
        return 0.0
    far = difference / (float(np.abs(whole).max()) or 1.0)
    return far if math.isfinite(far) else math.inf
