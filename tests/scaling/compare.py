"""How far two arrays are apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def apart(one: Any, other: Any, whole: Any = None) -> float:
    """The largest difference of two arrays, relative to the largest value of the other, or of the whole that it is of.

    Infinite where one has a number that the other has not, or where they are of other shapes or dtypes.
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
