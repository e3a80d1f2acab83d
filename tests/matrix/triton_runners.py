"""Runner of the torch adapter's Triton kernel, in Triton's interpreter on the CPU."""

from __future__ import annotations

import os

# Set before Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

from functools import partial

import triton
from matrix import torch_runners
from matrix.adapter_runner import AdapterRunner
from matrix.torch_runners import drive, gradients, scope

from vsgd.backends.torch import dispatch, loop

__all__ = ["RUNNERS", "gpu", "scope", "versions"]

dispatch.FUSED["cpu"] = dispatch.FUSED["cuda"]
# Keep another engine from taking a step.
loop.Loop.accepts = lambda *_: False

RUNNERS = {"torch-triton-interpreted": partial(AdapterRunner, drive, gradients, fused=True)}


def versions() -> dict[str, str]:
    return {**torch_runners.versions(), "triton": triton.__version__}


def gpu() -> None:
    """Return None: the interpreter uses no GPU."""
