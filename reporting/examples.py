"""Load the scripts of `examples/` as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).parents[1] / "examples"


def load_example(name: str) -> ModuleType:
    """Load an example as a module, without leaving it in `sys.modules`.

    Args:
        name: the file's name without ".py".

    Returns:
        The module.
    """
    spec = importlib.util.spec_from_file_location(name, _FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module while it runs
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module
