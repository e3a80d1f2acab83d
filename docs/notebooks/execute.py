"""Execute each notebook in a new kernel and write the outputs into it.

    tox run -e notebooks

The script joins streams and drops times, so that two executions differ only where their output differs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent


def execute(notebook: NotebookNode) -> None:
    """Run all cells in a new kernel and replace their outputs.

    Args:
        notebook: notebook to change in place.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=resources).execute()


def main() -> None:
    """Execute notebooks from the command line."""
    parser = argparse.ArgumentParser(description="Execute notebooks and write their outputs into them.")
    parser.add_argument("notebooks", type=Path, nargs="*", help="files (default: all notebooks in this folder)")
    for path in parser.parse_args().notebooks or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        execute(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
