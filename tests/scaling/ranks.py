"""Pools of processes that run a function together, each with the devices that its tests need, reused by many tests."""

from __future__ import annotations

import multiprocessing
import os
import platform
import socket
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from packaging.version import Version

#: Adds a new process to the group, given its rank, the number of processes and a free port.
Join = Callable[[int, int, int], None]

#: The types of the fixtures `on` and `agreed`.
On = Callable[..., list[Any]]
Agreed = Callable[..., None]

_PATIENCE = 120  # seconds, for the slowest call on a busy machine
#: x86 CPUs before AVX2 cannot multiply and add with one rounding.
_UNCONTRACTED = "--xla_cpu_max_isa=AVX"


def _torch_group(backend: str, rank: int, size: int, port: int) -> None:
    """Join a process group of torch; unless its backend is gloo alone, each rank uses the GPU of its number."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend != "gloo":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)


def _jax(count: int, flags: str, rank: int, size: int, port: int) -> None:
    """Use `count` CPU devices in each process; for 0, all GPUs in one process, or one in each of several, which JAX joins."""
    import jax

    os.environ["XLA_FLAGS"] = flags  # JAX reads it when it makes the first array
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # others need some of a GPU's memory
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")  # not TF32
    if count:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    if size > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address, mine = f"127.0.0.1:{port}", None if count else rank
        jax.distributed.initialize(address, size, rank, local_device_ids=mine, coordinator_bind_address=address)


def _keras(backend: str, device: str, rank: int, size: int, port: int) -> None:
    """Use eight CPU devices of JAX, two of TensorFlow, or one rank of torch; or all GPUs, with float32 products in float32."""
    os.environ.update(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="3", NVIDIA_TF32_OVERRIDE="0")
    os.environ.update(XLA_PYTHON_CLIENT_PREALLOCATE="false", TF_FORCE_GPU_ALLOW_GROWTH="true")
    if device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    if backend == "torch":
        _torch_group("gloo" if device == "cpu" else "cuda:nccl,cpu:gloo", rank, size, port)


#: The number of processes (0: one or two, by the number of GPUs), and how each joins the others.
POOLS: dict[str, tuple[int, Join]] = {
    "torch 2": (2, partial(_torch_group, "gloo")),
    "torch 4": (4, partial(_torch_group, "gloo")),
    "torch gpus": (0, partial(_torch_group, "cuda:nccl,cpu:gloo")),
    "jax": (1, partial(_jax, 8, "")),
    "jax uncontracted": (1, partial(_jax, 8, _UNCONTRACTED)),
    "jax processes": (2, partial(_jax, 2, _UNCONTRACTED)),
    "jax gpus": (1, partial(_jax, 0, "")),
    "jax gpu-processes": (2, partial(_jax, 0, "")),
    "keras-jax cpu": (1, partial(_keras, "jax", "cpu")),
    "keras-jax gpus": (1, partial(_keras, "jax", "gpus")),
    "keras-tensorflow cpu": (1, partial(_keras, "tensorflow", "cpu")),
    "keras-tensorflow gpus": (1, partial(_keras, "tensorflow", "gpus")),
    "keras-torch cpu": (2, partial(_keras, "torch", "cpu")),
    "keras-torch gpus": (0, partial(_keras, "torch", "gpus")),
}


def why_not(name: str) -> str:
    """Return why the processes of this name cannot run here, or None."""
    packages = name.split()[0].split("-")
    missing = [each for each in [*packages, *(["optax"] if packages == ["jax"] else [])] if find_spec(each) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if "torch" in packages:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_gloo_available()):
            return "this build of torch has no gloo"
    if "gpu" in name and count_gpus("torch") < max(POOLS[name][0], 1):
        return "too few GPUs"
    if name in ("jax uncontracted", "jax processes") and platform.machine() not in ("x86_64", "AMD64"):
        return "only on x86 can XLA be kept from contracting products and sums"
    if name == "jax processes" and Version(version("jax")) < Version("0.6.2"):
        return "this JAX mixes up the messages of CPU processes that communicate twice at once"
    return ""


def count_gpus(framework: str) -> int:
    """Return how many GPUs a framework finds in this process."""
    if framework == "torch":
        import torch

        return torch.cuda.device_count()
    if framework == "tensorflow":
        import tensorflow as tf

        return len(tf.config.list_physical_devices("GPU"))
    import jax

    try:
        return len(jax.devices("gpu"))
    except RuntimeError:  # JAX has no device of that kind
        return 0


class Ranks:
    """Processes that run a function together, each as one rank; they start at the first call, and again after a failed one."""

    def __init__(self, name: str) -> None:
        size, self._join = POOLS[name]
        self._size = size or min(count_gpus("torch"), 2)
        self._pools: list[ProcessPoolExecutor] = []

    def run(self, function: str, *args: Any) -> list[Any]:
        """Return a function's result on each rank; raise its first error, after ending all ranks.

        Args:
            function: its module in this folder, and its name.
            *args: its arguments, the same on all ranks.
        """
        if not self._pools:
            with socket.socket() as listening:
                listening.bind(("127.0.0.1", 0))
                port = listening.getsockname()[1]
            spawn = multiprocessing.get_context("spawn")
            ranks = range(self._size)
            self._pools = [ProcessPoolExecutor(1, spawn, self._join, (rank, self._size, port)) for rank in ranks]
        futures = [pool.submit(_call, function, *args) for pool in self._pools]
        done, waiting = wait(futures, _PATIENCE, FIRST_EXCEPTION)
        try:
            for future in done:
                future.result()
            assert not waiting, f"no answer in {_PATIENCE} s"
        except BaseException:
            self.stop()  # the other ranks may wait for this one forever
            raise
        return [future.result() for future in futures]

    def stop(self) -> None:
        """Kill all processes, because threads of gloo may abort a process that ends normally."""
        for pool in self._pools:
            for process in pool._processes.values():
                process.kill()
            pool.shutdown(cancel_futures=True)
        self._pools = []


def _call(function: str, *args: Any) -> Any:
    module, _, name = function.partition(".")
    return getattr(import_module(f"scaling.{module}"), name)(*args)
