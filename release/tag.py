"""Check that a tag may be released: `python -m release.tag v0.1.0`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import vsgd

_CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def check(tag: str, version: str, changelog: str) -> None:
    """Check that the tag, the package's version and the changelog's newest section name the same release.

    Args:
        tag: the commit's tag.
        version: the package's version.
        changelog: the text of the changelog, newest section first.

    Raises:
        ValueError: the tag or the changelog names another release.
    """
    if tag != f"v{version}":
        raise ValueError(f"tag is {tag!r}, but must be 'v{version}' for the package's version")
    newest = re.search(r"^## (.*)$", changelog, flags=re.MULTILINE)
    heading = newest[1] if newest else ""
    if not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}", heading):
        raise ValueError(f"changelog begins with {heading!r}, but must begin with '[{version}] - YYYY-MM-DD'")


if __name__ == "__main__":
    try:
        check(sys.argv[1], vsgd.__version__, _CHANGELOG.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(str(error))
