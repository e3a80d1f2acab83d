"""Make tests of the pages' snippets with Sybil: run Python and diffs, and look up shell commands.

The snippets of a page share one namespace, from top to bottom, and one folder. HTML comments, which readers do not see, hold
what a fragment needs in addition: `invisible-code: python`, `clear-namespace`, `skip: start if(missing("keras"))`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from project import commands
from sybil import Example, Sybil
from sybil.parsers.myst import ClearNamespaceParser, CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PAGES = [page for folder in (".", "docs", "docs/reference") for page in sorted((ROOT / folder).glob("*.md"))]


def run_both_sides(example: Example) -> None:
    """Run the lines that a diff removes, then those that it adds."""
    for sign in "-+":
        lines = [line[1:].strip() for line in example.parsed.splitlines() if line.startswith(sign)]
        exec("\n".join(lines), example.namespace)


snippets = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser("sh", lambda example: ", ".join(commands.absent(example.parsed))),
        CodeBlockParser("diff", run_both_sides),
        SkipParser(),
        ClearNamespaceParser(),
    ],
    patterns=["*.md"],
    path=str(ROOT),
    fixtures=["page_folder", "missing"],
)
pytest_collect_file = snippets.pytest()


@pytest.fixture(scope="module")
def page_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Change to a new folder, where a page's snippets write."""
    folder = tmp_path_factory.mktemp("page")
    with contextlib.chdir(folder):
        yield folder


@pytest.fixture(scope="session")
def missing() -> Callable[..., bool]:
    """Return a function that returns whether any of some packages is not installed."""
    return lambda *names: any(find_spec(name) is None for name in names)
