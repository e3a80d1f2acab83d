"""Describe the machine that a measurement ran on."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any


def count_processors() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_environment(packages: Iterable[str], threads: int, gpu: str | None) -> dict[str, Any]:
    """Describe the machine and the software that a measurement depends on.

    Args:
        packages: distributions to report the versions of; missing ones are skipped.
        threads: how many threads the framework uses.
        gpu: the GPU's name, or None where the steps run on the CPU.

    Returns:
        The description, as plain data for JSON.
    """
    return {
        "cpu": _read_cpu_name(),
        "processors": count_processors(),
        "threads": threads,
        "gpu": gpu,
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **_find_versions(packages)},
    }


def _read_cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _find_versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
