"""Write Markdown: tables, images, and sections of pages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> str:
    """Format a Markdown table with padded cells.

    Args:
        header: the heads of the columns.
        rows: the cells of each row.
        left: how many columns, from the first, are aligned to the left; the others, to the right. None: all to the left.

    Returns:
        The lines of the table, without a newline at the end.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = len(widths) if left is None else left
    rule = ["-" * width if place < left else "-" * max(1, width - 1) + ":" for place, width in enumerate(widths)]
    head, *body = (
        [cell.ljust(width) if place < left else cell.rjust(width) for place, (cell, width) in enumerate(padded)]
        for padded in (zip(line, widths, strict=True) for line in lines)
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def format_image(title: str, path: Path, page: Path) -> str:
    """Format a Markdown image.

    Args:
        title: what the image shows.
        path: of the image, in any folder.
        page: the page that shows the image.

    Returns:
        The image, by its path relative to the page.
    """
    return f"![{title}]({Path(os.path.relpath(path, page.parent)).as_posix()})"


def replace_section(page: Path, name: str, parts: Iterable[str]) -> None:
    """Write paragraphs between `<!-- NAME -->` and `<!-- /NAME -->` of a page, or at the end of a page without them.

    Args:
        page: the Markdown page; a missing page is created, titled after its file.
        name: of the section.
        parts: the paragraphs.

    Raises:
        ValueError: the section begins and does not end.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else f"# {page.stem.capitalize()}\n"
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = "\n\n".join([begin, *parts, end])
    if begin in text:
        before, _, rest = text.partition(begin)
        if end not in rest:
            raise ValueError(f"section {name!r} of {page} begins with {begin}, but must end with {end}")
        text = f"{before}{section}{rest.partition(end)[2]}"
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
