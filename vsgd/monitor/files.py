"""CSV files of looks: a monitor writes them during training, `read_looks` reads them."""

from __future__ import annotations

import csv
import io
import os
from operator import itemgetter
from pathlib import Path

from vsgd.monitor.summaries import QUANTITIES, Look, Summary, get_quantities

_COLUMNS: tuple[str, ...] = ("step", "tensor", *QUANTITIES, "loss")
# Momentum and noise scale follow from others.
_NEEDED = tuple(name for name in Summary._fields if name not in ("surprise", *Summary._field_defaults))


class CsvFile:
    """Write looks to a CSV file, one row per look and tensor, first the one named `overall`. A missing value is empty.

    The row `overall` has the loss, too. `read_looks` reads the file.

    Args:
        path: the file's path. Rows are appended to an existing file, in its columns, so that a resumed run continues it. A last
            line that a killed run did not finish is removed.

    Raises:
        ValueError: the file exists, and a monitor did not write it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "gradients.csv"
        >>> CsvFile(path).append(Look(10, Summary(0.5, 1.0, 2.0, 3.0, 8.0, 4.0, None), {}, loss=0.7))
        >>> header, row = path.read_text().splitlines()
        >>> header[:60]
        'step,tensor,gain,momentum,snr_10,snr_50,snr_90,noise_trace,n'
        >>> row
        '10,overall,0.5,0.5,1,2,3,8,4,2,,,,0.7'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._columns = _COLUMNS
        self._resumes = self.path.is_file() and self.path.stat().st_size > 0
        if self._resumes:
            with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
                header = file.readline()
            # A run may be killed while it writes the first line.
            if not ",".join(_COLUMNS).startswith(header):
                self._columns = _parse_header(self.path, header)

    def append(self, look: Look) -> None:
        """Append the rows of a look.

        Args:
            look: the look to write.
        """
        if self._resumes:
            _remove_unfinished_line(self.path)
            self._resumes = False
        with self.path.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                table.writerow(self._columns)
            # Cells in the order of `_COLUMNS`, then an empty one for columns that others added.
            select = itemgetter(*(_COLUMNS.index(each) if each in _COLUMNS else -1 for each in self._columns))
            loss = look.loss
            for name, summary in look.rows():
                # With float32's digits: all digits of a Python float take several times as long.
                cells = ("" if value is None else f"{value:.9g}" for value in (*get_quantities(summary), loss))
                table.writerow(select((look.step, name, *cells, "")))
                loss = None


def read_looks(path: str | os.PathLike[str]) -> list[Look]:
    """Read the looks that a monitor wrote to a CSV file.

    The columns `surprise`, `noise_scale_error`, `guarded` and `loss` may be missing. A last line that a killed run did not
    finish is skipped. Where a resumed run went back to an earlier step, its looks replace the later ones of the run before.

    Args:
        path: the file's path.

    Returns:
        The looks, in the order of their steps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a monitor's, or a line is damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "gradients.csv"
        >>> look = Look(10, Summary(0.5, 1.0, 2.0, 3.0, 8.0, 4.0, None), {}, loss=0.7)
        >>> CsvFile(path).append(look)
        >>> read_looks(path) == [look]
        True
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file, but must be a CSV file that a monitor wrote")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8, but must be a CSV file that a monitor wrote") from error
    lines = io.StringIO(text[: text.rfind("\n") + 1])
    columns = _parse_header(path, lines.readline())
    table = csv.reader(lines)
    looks: list[Look] = []
    tensors: dict[str, Summary] = {}
    for cells in table:
        where = f"{path}, line {table.line_num + 1}"
        if len(cells) != len(columns):
            raise ValueError(f"{where}: the number of cells is {len(cells)}, but must be {len(columns)}")
        row = dict(zip(columns, cells, strict=True))
        step = _parse_step(where, row["step"])
        numbers = {name: _parse_number(where, name, row.get(name, "")) for name in (*Summary._fields, "loss")}
        loss = numbers.pop("loss")
        summary = Summary(**numbers)  # type: ignore[arg-type]
        if row["tensor"] == "overall":
            while looks and looks[-1].step >= step:
                looks.pop()
            tensors = {}
            looks.append(Look(step, summary, tensors, loss))
        elif looks and looks[-1].step == step:
            tensors[row["tensor"]] = summary
        else:
            raise ValueError(f"{where}, column tensor: {row['tensor']!r} begins step {step}, but 'overall' must begin it")
    return looks


def _parse_header(path: Path, line: str) -> tuple[str, ...]:
    columns = tuple(next(csv.reader([line]), ()))
    missing = [name for name in ("step", "tensor", *_NEEDED) if name not in columns]
    if missing:
        raise ValueError(
            f"{path}, line 1: the columns {', '.join(missing)} are missing, but a monitor's CSV file must have them"
        )
    return columns


def _parse_step(where: str, cell: str) -> int:
    try:
        return int(cell)
    except ValueError:
        raise ValueError(f"{where}, column step: {cell!r} is not an integer, but must be one") from None


def _parse_number(where: str, column: str, cell: str) -> float | None:
    if not cell and column not in _NEEDED:
        return None
    try:
        return float(cell)
    except ValueError:
        allowed = "one" if column in _NEEDED else "one or empty"
        raise ValueError(f"{where}, column {column}: {cell!r} is not a number, but must be {allowed}") from None


def _remove_unfinished_line(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
