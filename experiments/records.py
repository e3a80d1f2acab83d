"""Store the records of finished runs and the metrics of each step, in files with one JSON object per line."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from reporting.machine import count_processors, describe_environment

try:
    import fcntl
except ImportError:  # Windows, where only one process at a time may write
    fcntl = None  # type: ignore[assignment]

#: Distributions whose versions a result may depend on; the environment lists the installed ones.
PACKAGES = (
    *("vsgd", "numpy", "keras", "jax", "jaxlib", "optax", "tensorflow", "tensorflow-cpu", "torch"),
    *("numba", "scikit-learn", "mnist1d", "pillow"),
)


def describe_run_environment(gpu: str | None = None) -> dict[str, Any]:
    """Describe the machine and the versions of the packages that runs use.

    Args:
        gpu: the GPU's name; None where the run does not use one.

    Returns:
        The description, as plain data for JSON.
    """
    return describe_environment(PACKAGES, count_processors(), gpu)


def _serialize_key(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def name_folder(key: Mapping[str, Any], *words: str) -> str:
    """Return a name for a run's folder, different for each key.

    Args:
        key: what identifies the run.
        *words: the beginning of the name, for readers.

    Returns:
        The name.
    """
    return "-".join((*words, hashlib.sha256(_serialize_key(key).encode()).hexdigest()[:8]))


def _format_line(value: Mapping[str, Any]) -> str:
    # NaN and infinities of diverged runs are written as Python's json writes and reads them.
    return json.dumps(value, separators=(",", ":")) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file; skip a last line that was cut off.

    Args:
        path: of the file, which may be missing.

    Returns:
        The objects.
    """
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def pack_records(path: Path) -> None:
    """Compress a file of records into `PATH.xz`, together with those that are there already, and remove the file.

    Args:
        path: of the file.
    """
    lines = [_format_line(each) for each in (*_read_packed(path), *read_jsonl(path))]
    packed = _name_packed(path)
    written = packed.with_suffix(".new")
    # Through another file, so that a process killed here loses nothing.
    written.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    written.replace(packed)
    path.unlink(missing_ok=True)


def _name_packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.xz")


def _read_packed(path: Path) -> list[dict[str, Any]]:
    packed = _name_packed(path)
    return list(map(json.loads, lzma.open(packed, "rt", encoding="utf-8"))) if packed.exists() else []


def _append_line(path: Path, line: str) -> None:
    """Append a line after the last whole one, safe for several processes and when a process is killed."""
    with path.open("ab+") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # closing the file unlocks it
        file.seek(0)
        data = file.read()
        if not data.endswith(b"\n"):
            # A process was killed while it wrote.
            file.truncate(data.rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


class Records:
    """The finished runs of a file, by key.

    A key is a mapping of everything that identifies a run: its task, optimizer, hyperparameters, seed. Each finished run is one
    line, so a killed process leaves whole records. Several processes may append to one file; each process sees the records
    written before it started.

    Args:
        path: of the file, which may not exist yet. `pack_records` moves its records into `PATH.xz`, from where they are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = {_serialize_key(record["key"]): record for record in (*_read_packed(path), *read_jsonl(path))}

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        """Return whether the run is finished."""
        return _serialize_key(key) in self._records

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the records, oldest first."""
        return iter(self._records.values())

    def __len__(self) -> int:
        """Return the number of finished runs."""
        return len(self._records)

    def __getitem__(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record of a finished run."""
        return self._records[_serialize_key(key)]

    def append(self, key: Mapping[str, Any], **found: Any) -> dict[str, Any]:
        """Append the record of a finished run to the file.

        Args:
            key: identifies the run.
            **found: the run's results.

        Returns:
            The record.

        Raises:
            ValueError: the run already has a record.
        """
        if key in self:
            raise ValueError(f"key is {dict(key)}, but must be of a run that has no record in {self.path}")
        record = {"key": dict(key), **found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _append_line(self.path, _format_line(record))
        self._records[_serialize_key(key)] = record
        return record


class Steps:
    """Metrics by step, written immediately; a resumed run keeps earlier steps.

    Args:
        path: of the file, which may not exist yet.
        after: the last step to keep; later ones are dropped, because the run repeats them.
    """

    def __init__(self, path: Path, after: int = 0) -> None:
        kept = [each for each in read_jsonl(path) if each["step"] <= after]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Through another file, so that a process killed here loses nothing.
        written = path.with_suffix(".new")
        written.write_text("".join(map(_format_line, kept)), encoding="utf-8")
        written.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # writes each line at once

    def write(self, step: int, **metrics: float) -> None:
        """Write the metrics of a step.

        Args:
            step: counted from 1.
            **metrics: by name.
        """
        self._file.write(_format_line({"step": step, **metrics}))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
