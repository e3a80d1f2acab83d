"""Write a page of a CSV file of looks: `python -m vsgd.monitor report gradients.csv`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vsgd.monitor.files import read_looks
from vsgd.monitor.report import make_report


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        words: the command line; None is the process's.

    Raises:
        SystemExit: an argument or the file is wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m vsgd.monitor", description="Read the looks of a monitored training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser("report", help="write a page with figures", description="Write one HTML page with figures.")
    report.add_argument("csv", type=Path, help="a CSV file that a monitor wrote")
    report.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    report.add_argument("--batch-size", type=float, help="the batch size, to compare with the noise scale")
    report.add_argument("--title", help="the page's title (default: the file's name)")
    arguments = parser.parse_args(words)
    try:
        _write_report(arguments.csv, arguments.output, arguments.batch_size, arguments.title or arguments.csv.name)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")


def _write_report(file: Path, output: Path, batch_size: float | None, title: str) -> None:
    looks = read_looks(file)
    if not looks:
        raise ValueError(f"{file} contains no looks, but must contain at least one")
    if output.exists() and output.samefile(file):
        raise ValueError(f"--output is {output}, but must be another file than the CSV file")
    output.write_text(make_report(looks, title=title, batch_size=batch_size), encoding="utf-8")
    print(f"{output}: {len(looks)} looks of {file}")


if __name__ == "__main__":
    main()
