"""Processes of JAX with the devices that the tests of sharding need."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from platform import machine

import jax
from scaling.ranks import Ranks

#: x86 before AVX2 has no instruction that multiplies and adds with one rounding.
UNCONTRACTED = "--xla_cpu_max_isa=AVX"


def why_not(name: str) -> str:
    """Why the processes of this name cannot run here, if they cannot."""
    if name in ("uncontracted", "processes") and machine() not in ("x86_64", "AMD64"):
        return "only on x86 can XLA be kept from contracting products and sums"
    if name == "processes" and jax.__version_info__ < (0, 6, 2):
        return "this JAX mixes up the messages of CPU processes that communicate twice at once"
    return ""


def virtual(count: int, flags: str, rank: int, size: int, store: str) -> None:
    """So many CPU devices in one process; XLA reads its flags when the first array is made."""
    os.environ["XLA_FLAGS"] = flags
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_enable_x64", True)


def joined(port: int, rank: int, size: int, store: str) -> None:
    """Two CPU devices in each of several processes that JAX joins."""
    virtual(2, UNCONTRACTED, rank, size, store)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _join(port, rank, size)


def gpus(rank: int, size: int, store: str) -> None:
    """All GPUs in one process, of whose memory others need some."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    jax.config.update("jax_default_matmul_precision", "highest")  # not TF32
    jax.config.update("jax_enable_x64", True)


def joined_gpus(port: int, rank: int, size: int, store: str) -> None:
    """One GPU in each of several processes that JAX joins."""
    gpus(rank, size, store)
    _join(port, rank, size, local_device_ids=rank)


def _join(port: int, rank: int, size: int, **options: int) -> None:
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, size, rank, coordinator_bind_address=address, **options)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def number(platform: str) -> int:
    """How many devices of a kind there are."""
    try:
        return len(jax.devices(platform))
    except RuntimeError:  # it knows none of that kind
        return 0


def pool(name: str, folder: Path) -> Ranks:
    """The processes of this name."""
    size, join = {
        "devices": (1, partial(virtual, 8, "")),
        "uncontracted": (1, partial(virtual, 8, UNCONTRACTED)),
        "processes": (2, partial(joined, _free_port())),
        "gpus": (1, gpus),
        "gpu processes": (2, partial(joined_gpus, _free_port())),
    }[name]
    return Ranks(size, folder, join)
