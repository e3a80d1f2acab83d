"""State how the pages' plots look: a colour for each optimizer, a size for phones, and text for light and dark pages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

#: The colour of text, axes and references: its contrast is above 4 with the pages' white and with their black.
INK = "#7a7a7a"

#: Each optimizer's colour, with a contrast above 3.8 with white and black. A name that contains another one comes first.
OPTIMIZERS = {
    "Muon": "#0f8a99",
    "AdaBelief": "#b0609b",
    "Constant VSGD": "#00916a",
    "VSGD": "#1f7fc4",
    "AdamW": "#d55e00",
    "AMSGrad": "#8d7a1f",
    "Adam": "#d6408a",
    "Lion": "#8b68d8",
    "SGD": "#a87900",
}

#: The colours of everything else, such as layers, in the order of drawing.
CYCLE = ("#1f7fc4", "#d55e00", "#00916a", "#b0609b", "#a87900", "#8b68d8")

_DASHES = ("solid", "dashed", "dotted", "dashdot", (0, (6, 1, 1, 1, 1, 1)))

#: In inches: on a phone, whose page has 360 pixels for a plot, a label of `_FONT` points then has 11 pixels.
WIDTH = 5.6
_FONT = 12.5

_INKS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
_STYLE: dict[str, Any] = {
    **dict.fromkeys(_INKS, INK),
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelsize": _FONT,
    "axes.prop_cycle": f"cycler(color={CYCLE})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": _FONT,
    "figure.facecolor": "none",
    "figure.titlesize": _FONT,
    "font.size": _FONT,
    "grid.alpha": 0.25,
    "legend.fontsize": 0.9 * _FONT,
    "legend.frameon": False,
    "legend.title_fontsize": 0.9 * _FONT,
    "lines.markersize": 4,
    "svg.hashsalt": "vsgd",  # equal plots are equal files
    "xtick.labelsize": 0.9 * _FONT,
    "ytick.labelsize": 0.9 * _FONT,
}


def find_colour(name: str) -> str:
    """Return the colour of an optimizer.

    Args:
        name: the optimizer's name or that of its class or function, with or without settings.

    Returns:
        The colour, as "#rrggbb".

    Raises:
        ValueError: `OPTIMIZERS` has no such optimizer.

    Example:
        >>> find_colour("AdamW, warm-up") == find_colour("optax.adamw") == OPTIMIZERS["AdamW"]
        True
    """
    letters = _keep_letters(name)
    for optimizer, colour in OPTIMIZERS.items():
        if _keep_letters(optimizer) in letters:
            return colour
    raise ValueError(f"name is {name!r}, but must contain one of {', '.join(OPTIMIZERS)}")


def style_optimizers(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Choose the lines of one plot: the optimizer sets the colour, and its settings differ by their dashes.

    Args:
        names: of the curves.

    Returns:
        Arguments of `Axes.plot` for each name.

    Example:
        >>> styles = style_optimizers(["VSGD", "AdamW", "AdamW, warm-up"])
        >>> styles["AdamW, warm-up"]
        {'color': '#d55e00', 'linestyle': 'dashed'}
    """
    styles: dict[str, dict[str, Any]] = {}
    for name in names:
        colour = find_colour(name)
        drawn = sum(style["color"] == colour for style in styles.values())
        styles[name] = {"color": colour, "linestyle": _DASHES[drawn % len(_DASHES)]}
    return styles


@contextlib.contextmanager
def drawing(path: Path, height: float) -> Iterator[Any]:
    """Make an empty figure in the pages' style, and save it as SVG at the end of the block.

    Args:
        path: of the image file, ending in ".svg".
        height: of the figure, in inches; its width is `WIDTH`.

    Yields:
        The figure.
    """
    import matplotlib.style
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and chooses the process's backend

    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=200, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def _keep_letters(name: str) -> str:
    return "".join(filter(str.isalpha, name.lower()))
