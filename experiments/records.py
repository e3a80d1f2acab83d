"""What runs leave: a record of each finished one, and metrics of each step, in files of JSON objects, one a line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from reporting.machine import count_processors, describe_environment

try:
    import fcntl
except ImportError:  # not on Windows, where one process at a time may write
    fcntl = None  # type: ignore[assignment]

#: Distributions whose versions a result may depend on; those that are installed are noted.
PACKAGES = (
    *("vsgd", "numpy", "keras", "jax", "jaxlib", "tensorflow", "tensorflow-cpu", "torch"),
    *("numba", "scikit-learn", "mnist1d", "pillow"),
)


def describe_run_environment(gpu: str | None = None) -> dict[str, Any]:
    """The machine and the versions of what runs on it.

    Args:
        gpu: the GPU's name, where the run uses one.
    """
    return describe_environment(PACKAGES, count_processors(), gpu)


def _serialize_key(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def name_folder(key: Mapping[str, Any], *words: str) -> str:
    """A name for a run's folder, another for each key.

    Args:
        key: what identifies the run.
        *words: what a reader should know it by.
    """
    return "-".join((*words, hashlib.sha256(_serialize_key(key).encode()).hexdigest()[:8]))


def _format_line(value: Mapping[str, Any]) -> str:
    # NaN and infinities, which a diverged run has, are told as Python's json does and reads.
    return json.dumps(value, separators=(",", ":")) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, none where there is no file; a last line that was cut off is left out.

    Args:
        path: of the file.
    """
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _append_line(path: Path, line: str) -> None:
    """Write a line after all whole ones, however many processes do so, and whenever one of them is killed."""
    with path.open("ab+") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        file.seek(0)
        data = file.read()
        if not data.endswith(b"\n"):
            # One was killed as it wrote.
            file.truncate(data.rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


class Records:
    """The finished runs of a file, by what identifies them.

    A run's key is a mapping of what makes it another run: its task, optimizer, hyperparameters, seed. Each finished run is one
    line, so that a killed process leaves whole records, and several processes may append to one file; each sees what the others
    wrote before it began.

    Args:
        path: of the file, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = {_serialize_key(record["key"]): record for record in read_jsonl(path)}

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        """Whether the run is finished."""
        return _serialize_key(key) in self._records

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records, oldest first."""
        return iter(self._records.values())

    def __len__(self) -> int:
        """How many runs are finished."""
        return len(self._records)

    def __getitem__(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """The record of a finished run."""
        return self._records[_serialize_key(key)]

    def append(self, key: Mapping[str, Any], **found: Any) -> dict[str, Any]:
        """Write the record of a run that finished.

        Args:
            key: what identifies it.
            **found: whatever is to be kept beside the key.

        Returns:
            The record.

        Raises:
            ValueError: the run has a record.
        """
        if key in self:
            raise ValueError(f"key is {dict(key)}, but must be of a run that has no record in {self.path}")
        record = {"key": dict(key), **found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _append_line(self.path, _format_line(record))
        self._records[_serialize_key(key)] = record
        return record


class Steps:
    """Metrics by step, written as they come; a resumed run goes on after the steps that it keeps.

    Args:
        path: of the file, which may not exist yet.
        after: the last step that is kept; later ones, which will be taken again, are dropped.
    """

    def __init__(self, path: Path, after: int = 0) -> None:
        kept = [each for each in read_jsonl(path) if each["step"] <= after]
        path.parent.mkdir(parents=True, exist_ok=True)
        # By another file, for a process killed here must not lose what was there.
        written = path.with_suffix(".new")
        written.write_text("".join(map(_format_line, kept)), encoding="utf-8")
        written.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # each line at once

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
