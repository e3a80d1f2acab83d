"""DeepSpeed's ZeRO, on the recipe of the documentation, in two processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

for package in ("torch", "deepspeed", "sklearn"):
    pytest.importorskip(package)


def test_the_recipe_and_each_stage_resumed_end_where_a_plain_loop_ends(
    two_processes: Callable[[str], list[dict[str, Any]]],
) -> None:
    for seen in two_processes("deepspeed"):
        assert seen["processes"] == 2
        assert seen["strayed by"] == {"recipe": 0, "stage 0": 0, "stage 1": 0, "stage 2": 0, "stage 3": 0}
