"""Test that each trainer in two processes, with the documentation's recipe, equals a plain loop in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from research.scripts import need

need("torch", "sklearn")

from scaling.torch_problem import fsdp2  # noqa: E402

Seen = Callable[[str], list[dict[str, Any]]]


@pytest.mark.parametrize("name", ["accelerate", "transformers", "lightning, DDP"])
def test_replicas_are_equal(name: str, two_processes: Seen) -> None:
    pytest.importorskip(name.partition(",")[0])
    one, other = two_processes(name)
    assert one["processes"] == 2
    assert one == other
    assert one["strayed"] == 0


@fsdp2
def test_lightning_by_fsdp2_resumed(two_processes: Seen) -> None:
    pytest.importorskip("lightning")
    for seen in two_processes("lightning, FSDP2"):
        assert seen["here"] == 0.5
        assert seen["strayed"] == 0


def test_deepspeeds_recipe_and_each_stage_resumed(two_processes: Seen) -> None:
    pytest.importorskip("deepspeed")
    for seen in two_processes("deepspeed"):
        assert seen["processes"] == 2
        assert seen["strayed by"] == {"recipe": 0, "stage 0": 0, "stage 1": 0, "stage 2": 0, "stage 3": 0}
