"""Numba's array namespace: each function on one number, inlined."""

from __future__ import annotations

from numba.extending import register_jitable
from numpy import maximum, minimum, sqrt

__all__ = ["OPTIONS", "inline", "maximum", "minimum", "sqrt"]

#: What functions are compiled with. Never nnan or ninf: a NaN gradient must show.
OPTIONS = {"fastmath": {"contract", "arcp", "nsz"}, "error_model": "numpy"}

#: Makes a function one that a compiled function may call.
inline = register_jitable(**OPTIONS)
