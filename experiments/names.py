"""Looking things up by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def look_up(kind: str, name: str, known: Mapping[str, Value]) -> Value:
    """What has this name.

    Args:
        kind: of thing, as the error calls it.
        name: of the one that is wanted.
        known: all of them.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in known:
        raise ValueError(f"{kind} is {name!r}, but must be one of {', '.join(known)}")
    return known[name]
