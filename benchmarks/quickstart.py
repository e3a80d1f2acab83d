"""Load the quickstart's model, data and training for the measurements that use them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_EXAMPLE = Path(__file__).parents[1] / "examples" / "quickstart.py"


def load() -> ModuleType:
    """Return the example as a module."""
    spec = importlib.util.spec_from_file_location("quickstart", _EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module
