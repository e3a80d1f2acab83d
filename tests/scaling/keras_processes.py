"""Processes of Keras, each with one backend and with the devices that the tests need."""

from __future__ import annotations

import importlib
import os
from functools import partial
from pathlib import Path
from typing import Any

from scaling.ranks import Ranks, torch_group


def call(module: str, function: str, *args: Any) -> Any:
    """Run a function of a module that imports a backend, which the process that asks must not."""
    return getattr(importlib.import_module(f"scaling.{module}"), function)(*args)


def on_cpu(backend: str, rank: int, size: int, store: str) -> None:
    """Eight devices of JAX, or one rank of torch."""
    os.environ.update(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
    if backend == "jax":
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    if backend == "torch":
        torch_group("gloo", rank, size, store)


def on_gpus(backend: str, rank: int, size: int, store: str) -> None:
    """All GPUs, or that of the rank; float32 products are to be of float32."""
    os.environ.update(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="3", NVIDIA_TF32_OVERRIDE="0")
    os.environ.update(XLA_PYTHON_CLIENT_PREALLOCATE="false", TF_FORCE_GPU_ALLOW_GROWTH="true")
    if backend == "torch":
        torch_group("cuda:nccl,cpu:gloo", rank, size, store)


def pool(backend: str, device: str, folder: Path) -> Ranks:
    """The processes of a backend: two of torch, where there is not only one GPU, and one of the others."""
    join = partial({"cpu": on_cpu, "gpu": on_gpus}[device], backend)
    return Ranks(_number(device) if backend == "torch" else 1, folder, join)


def _number(device: str) -> int:
    if device == "cpu":
        return 2
    import torch

    return min(torch.cuda.device_count(), 2)
