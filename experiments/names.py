"""Look up things by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def look_up(what: str, name: str, table: Mapping[str, Value]) -> Value:
    """Return the value with a name.

    Args:
        what: what the error calls the name.
        name: the key.
        table: the values by name.

    Returns:
        The value.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in table:
        raise ValueError(f"{what} is {name!r}, but must be one of {', '.join(table)}")
    return table[name]
