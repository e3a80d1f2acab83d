"""A page of a monitored training, one HTML file without references to others, with matplotlib: `pip install matplotlib`."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vsgd.monitor.plots import choose_ticks, draw_heat_map, draw_loss, draw_noise_scale, draw_surprise
from vsgd.monitor.progress import format_number
from vsgd.monitor.summaries import Look, Summary
from vsgd.validation import validate_numbers

__all__ = ["make_report"]

#: A surprise above this counts as surprising: innovations twice as large as predicted.
SURPRISING = 4.0

# In inches and points. A phone shows a figure nearly in this size, so a label has about 11 pixels there.
_WIDTH, _HEIGHT, _FONT, _ROW = 5.6, 3.6, 12.5, 14.0
_MOST_LABELS = 40
_LONGEST_LABEL = 24
# Colours of the drawings, which the page replaces by its own, because they depend on the reader's theme.
_COLOURS = {"#00abc0": "currentColor", "#00abc1": "var(--first)", "#00abc2": "var(--second)"}
_INK, *_CYCLE = _COLOURS

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --faint: #59636e; --rule: #d1d9e0; --first: #0f6cbd;
  --second: #c4450c; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --ink: #e6eaef; --faint: #9aa5b1; --rule: #39424c; --first: #6cb6ff; --second: #ffa15c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { font-weight: normal; color: var(--faint); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 2.5rem 3rem;
  margin: 2.5rem 0; }
#gain { grid-column: 1; }
figure { margin: 0; max-width: 36rem; }
figcaption { color: var(--faint); }
svg { display: block; width: 100%; max-width: 100%; height: auto; }
svg text, svg tspan { font-family: system-ui, sans-serif !important; }
details { overflow-x: auto; }
details table { font-size: .85rem; }
details th, details td { padding-right: .5rem; }
details th:first-child { min-width: 7rem; max-width: 30rem; overflow-wrap: anywhere; }
details td { text-align: right; }
summary { cursor: pointer; }
"""


class _Figure(NamedTuple):
    """A figure of the page.

    Attributes:
        key: a word that no other figure has.
        title: the heading.
        reading: how to read the figure.
        draw: a function that draws it into axes.
        height: in inches.
    """

    key: str
    title: str
    reading: str
    draw: Callable[[Any], None]
    height: float = _HEIGHT


def make_report(looks: Sequence[Look], *, title: str = "A monitored training", batch_size: float | None = None) -> str:
    """Make a page with a summary and a figure of each quantity that the looks contain.

    The page is one HTML document that refers to no other file, in the reader's light or dark theme. Equal arguments make equal
    pages, with one version of matplotlib.

    Args:
        looks: the looks of a monitor, or of `vsgd.monitor.read_looks`.
        title: the page's title.
        batch_size: the batch size, to which the page compares the noise scale; None omits it.

    Returns:
        The HTML document.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no looks, or `batch_size` is out of its range.

    Example:
        >>> from vsgd.monitor import Summary
        >>> layer = Summary(0.25, 1.0, 2.0, 3.0, noise_trace=800.0, noise_squared_norm=2.0, surprise=1.1)
        >>> looks = [Look(step, layer, {"layer": layer}, loss=1 / step) for step in (10, 20, 30)]
        >>> page = make_report(looks, title="Three looks", batch_size=64)
        >>> page.count("<figcaption>")
        5
    """
    if not looks:
        raise ValueError("looks is empty, but must hold at least one")
    if batch_size is not None:
        validate_numbers(batch_size=batch_size)
    facts = "\n".join(f"<tr><th scope=row>{name}</th><td>{value}</td></tr>" for name, value in _list_facts(looks, batch_size))
    figures = "\n".join(map(_format_figure, _choose_figures(looks, batch_size)))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
<table>
{facts}
</table>
<div class="figures">
{figures}
</div>
{_format_tensors(_list_tensors(looks))}
</main>
</body>
</html>
"""


def _list_facts(looks: Sequence[Look], batch_size: float | None) -> list[tuple[str, str]]:
    """Return the names and values of the summary."""
    last = looks[-1]
    facts = [
        ("Steps", f"{last.step:,} ({len(looks):,} looks)"),
        ("Tensors", str(len(_list_tensors(looks)))),
    ]
    losses = [look.loss for look in looks if look.loss is not None]
    if losses:
        facts.append(("Loss at the last look", format_number(losses[-1])))
    facts.append(("Median gain at the last look", format_number(last.overall.gain)))
    # An observer's state has a trace and no squared norm.
    if math.isfinite(last.overall.noise_squared_norm) or not math.isfinite(last.overall.noise_trace):
        facts.append(("Noise scale at the last look", _describe_noise_scale(last.overall, batch_size)))
    surprises = [look.overall.surprise for look in looks if look.overall.surprise is not None]
    if surprises:
        share = sum(surprise > SURPRISING for surprise in surprises) / len(surprises)
        facts.append((f"Looks with a surprise above {SURPRISING:g}", f"{share:.0%}"))
    guarded = [look.overall.guarded for look in looks if look.overall.guarded is not None]
    if guarded:
        facts.append(("Guarded steps", f"{sum(guarded):.0f}"))
    return facts


def _list_tensors(looks: Sequence[Look]) -> dict[str, Summary]:
    """Return the last summary of each tensor: the last look of a killed run may lack some."""
    return {name: summary for look in looks for name, summary in look.tensors.items()}


def _describe_noise_scale(summary: Summary, batch_size: float | None) -> str:
    scale = summary.noise_scale
    if not 0 < scale < math.inf:
        return "none: noise hides the gradient"
    if batch_size is None:
        return format_number(scale)
    return f"{format_number(scale)}, {format_number(scale / batch_size)} batches of {format_number(batch_size)}"


def _choose_figures(looks: Sequence[Look], batch_size: float | None) -> Iterator[_Figure]:
    """Yield the figures of all quantities that the looks contain."""
    overalls = [look.overall for look in looks]
    if any(look.loss is not None and math.isfinite(look.loss) for look in looks):
        reading = "Where the loss rises or stalls, look at the same steps of the other figures."
        yield _Figure("loss", "Loss", reading, lambda axes: draw_loss(axes, looks))
    found = sum(0 < each.noise_scale < math.inf for each in overalls) / len(looks)
    if found:
        reading = "A larger batch pays, in theory, "
        reading += "up to the noise scale" if batch_size is None else "where the noise scale is above the batch size"
        reading += f"; in the gaps, {1 - found:.0%} of the looks, noise hides the gradient" if found < 1 else ""
        measured = any(each.noise_scale_error is not None for each in overalls)
        reading += "." if measured else " (without a standard error the noise scale is only a trend)."
        yield _Figure("noise", "Noise scale", reading, lambda axes: draw_noise_scale(axes, looks, batch_size))
    if any(each.surprise is not None and math.isfinite(each.surprise) for each in overalls):
        reading = "Near 1 gradients vary as the state predicts, far above 1 they vary more, far below 1 less"
        reading += "; triangles mark looks after guarded steps." if any(each.guarded for each in overalls) else "."
        yield _Figure("surprise", "Surprise", reading, lambda axes: draw_surprise(axes, looks))
    names = list(_list_tensors(looks))
    every = math.ceil(len(names) / _MOST_LABELS)
    labels = "." if every == 1 else f" (one tensor of {every} has a label)."
    height = 1.6 + _ROW / 72 * max(4, min(len(names), _MOST_LABELS))
    for quantity, title, reading in (
        ("gain", "Gain by tensor", "Compare the rows: at a gain of 1 the mean copies each new gradient, at 0 it ignores it"),
        ("snr_50", "Signal to noise by tensor", "Below 1 a gradient looks like noise; all rows fall where gradients shrink"),
    ):
        if any(0 < getattr(summary, quantity) < math.inf for look in looks for summary in look.tensors.values()):
            yield _Figure(quantity, title, reading + labels, _make_heat_map(looks, names[::every], every, quantity), height)


def _make_heat_map(looks: Sequence[Look], names: Sequence[str], every: int, quantity: str) -> Callable[[Any], None]:
    """Return a function that draws a heat map with names at one row of `every`."""

    def draw(axes: Any) -> None:
        draw_heat_map(axes, looks, quantity, bar_location="top")
        bar = axes.collections[0].colorbar
        bar.set_label("")  # the heading says it
        _set_plain_ticks(bar.ax.xaxis)
        rows = [every * index + 0.5 for index in range(len(names))]
        axes.set_yticks(rows, [abbreviate(name, _LONGEST_LABEL) for name in names], fontsize=0.9 * _FONT)

    return draw


def abbreviate(name: str, most: int) -> str:
    """Shorten a tensor's name: first the words of its path to their initials, but for the last two, then the middle.

    Args:
        name: the tensor's name, a path with dots or slashes.
        most: the largest number of characters.

    Example:
        >>> abbreviate("model.layers.0.self_attention.query.weight", 24)
        'm.l.0.s.query.weight'
        >>> abbreviate("model.layers.0.input_normalization.weight", 24)
        'm.l.0.input_…tion.weight'
    """
    parts = re.split(r"([./])", name)
    for index in range(0, len(parts) - 3, 2):
        if len("".join(parts)) > most:
            parts[index] = re.sub(r"([^\W\d_])[^\W\d]*", r"\1", parts[index])
    short = "".join(parts)
    tail = (most - 1) // 2
    return short if len(short) <= most else f"{short[: most - 1 - tail]}…{short[-tail:]}"


def _format_figure(figure: _Figure) -> str:
    alt = html.escape(f"{figure.title} over the steps")
    return f"""<figure id="{figure.key}">
<h2>{figure.title}</h2>
{_draw_svg(figure, alt)}
<figcaption>{figure.reading}</figcaption>
</figure>"""


def _draw_svg(figure: _Figure, alt: str) -> str:
    """Return a drawing as an SVG element for inside HTML, with the page's colours and fonts."""
    try:
        import matplotlib.style
        from matplotlib.collections import QuadMesh
        from matplotlib.figure import Figure  # not pyplot, which keeps figures and chooses the process's backend
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError as error:
        raise ImportError("a report needs matplotlib: run pip install matplotlib") from error

    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    settings: dict[str, Any] = {
        **dict.fromkeys(inks, _INK),
        "axes.prop_cycle": f"cycler(color={_CYCLE})",
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": _FONT,
        "axes.labelsize": _FONT,
        "legend.fontsize": _FONT,
        "lines.markersize": 4,
        "svg.fonttype": "none",  # text remains text
        "svg.hashsalt": figure.key,
    }
    with matplotlib.style.context(["default", settings]):
        drawing = Figure(figsize=(_WIDTH, figure.height), layout="constrained")
        axes = drawing.subplots()
        figure.draw(axes)
        axes.set_ylabel("")  # the heading says it
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if axes.get_yscale() == "log":
            _set_plain_ticks(axes.yaxis)
        if axes.get_legend():
            # Without the note on gaps, which the caption has.
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        for part in (part for each in drawing.axes for part in each.collections):
            part.set_rasterized(isinstance(part, QuadMesh))  # one image for thousands of cells
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawing.savefig(file, format="svg", transparent=True, dpi=200, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, shown in _COLOURS.items():
        svg = svg.replace(drawn, shown)
    # Names of one drawing's parts must differ from another's on the same page.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{figure.key}-", svg)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{alt}"', svg, count=1)


def _set_plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with a few plain numbers: labels such as 2 x 10^-4 are too long for a small figure."""
    ticks = choose_ticks(*sorted(axis.get_view_interval()))
    axis.set_ticks(ticks, [f"{tick:.6g}" for tick in ticks])
    axis.set_minor_formatter(lambda value, place: "")


def _format_tensors(tensors: Mapping[str, Summary]) -> str:
    """Return a table of the tensors, which the reader can open."""
    columns = {"gain": "gain", "snr_50": "signal to noise", "noise_scale": "noise scale", "surprise": "surprise"}
    columns = {
        name: head for name, head in columns.items() if any(getattr(each, name) is not None for each in tensors.values())
    }
    heads = "".join(f"<th scope=col>{head}</th>" for head in ("tensor", *columns.values()))
    rows = []
    for tensor, summary in tensors.items():
        numbers = {name: getattr(summary, name) for name in columns}
        if not 0 < summary.noise_scale < math.inf:
            numbers["noise_scale"] = None
        cells = "".join(f"<td>{'' if number is None else format_number(number)}</td>" for number in numbers.values())
        rows.append(f"<tr><th scope=row>{html.escape(tensor)}</th>{cells}</tr>\n")
    return f"""<details>
<summary>Each tensor at its last look</summary>
<table>
<tr>{heads}</tr>
{"".join(rows)}</table>
</details>"""
