"""Execute the notebooks, each in a kernel of its own, and write their outputs into them.

    tox run -e notebooks

Streams are joined and no times are kept, so that only what a notebook says tells one execution from another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent


def execute(notebook: NotebookNode) -> None:
    """Run all cells in a new kernel, and replace their outputs.

    Args:
        notebook: it is changed.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=place).execute()


def main() -> None:
    """Execute notebooks from the command line."""
    parser = argparse.ArgumentParser(description="Execute the notebooks and write their outputs into them.")
    parser.add_argument("notebooks", type=Path, nargs="*", help="files (default: all notebooks beside this file)")
    for path in parser.parse_args().notebooks or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        execute(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
