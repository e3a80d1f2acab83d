"""What a compiled kernel is made of, for disk caches that look at no other file than the kernel's own."""

from __future__ import annotations

import hashlib
import inspect
from types import ModuleType

from vsgd import core, outliers, posterior, rounding


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
