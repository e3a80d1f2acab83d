"""Write the results into a page: Markdown tables and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import plots, shapes
from benchmarks.timing import Spread, compute_paired_ratio, compute_seconds_per_byte, compute_spread, select_taken
from reporting.pages import format_image, format_table, replace_section


def _format_ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _select_cells(results: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Select the part's results, in the order of the named shapes; of other shapes if no named one has the part."""
    cells = results["cells"]
    found = {name: cells[name][part] for name in shapes.NAMED if part in cells.get(name, {})}
    return found or {name: cell[part] for name, cell in cells.items() if part in cell}


def _list_competitors(cells: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells.values() for name in cell["competitors"]))


def format_times(results: Mapping[str, Any], baseline: str) -> str:
    """Format the table of times, as ratios to a baseline's.

    Args:
        results: of a suite.
        baseline: the competitor to compare the others with.

    Returns:
        The Markdown table.
    """
    cells = _select_cells(results, "times")
    rows = []
    for name in _list_competitors(cells):
        row = [name]
        for cell in cells.values():
            if name not in cell["competitors"]:
                row.append("")
                continue
            found = cell["competitors"][name]
            seconds = found["seconds"]
            ratio = _format_ratio(compute_paired_ratio(seconds, found["against"][baseline]))
            median = 1e3 * compute_spread(select_taken(seconds)).median
            row.append(f"{'1' if name == baseline else ratio}, {median:.3g} ms")
        rows.append(row)
    return format_table([f"time / {baseline}", *cells], rows)


def format_memory(results: Mapping[str, Any]) -> str:
    """Format the table of state, transient memory and first steps.

    Args:
        results: of a suite, with probes.

    Returns:
        The Markdown table.
    """
    timed, probed = _select_cells(results, "times"), _select_cells(results, "probes")
    rows = []
    for name in _list_competitors(probed):
        sizes = [cell["competitors"][name] for cell in timed.values() if name in cell["competitors"]]
        row = [name, f"{min(each['state_bytes_per_parameter'] for each in sizes):.1f}" if sizes else ""]
        found = [cell["competitors"].get(name) for cell in probed.values()]
        peaks = [None if each is None else each["transient_bytes"] for each in found]
        row += ["" if size is None else f"{size / 1e6:.3g}" for size in peaks]
        row += ["" if each is None else f"{each['first_step_seconds']:.2g}" for each in found]
        rows.append(row)
    header = ["", "state, bytes / parameter", *(f"peak of a step, MB: {name}" for name in probed)]
    return format_table([*header, *(f"first step, s: {name}" for name in probed)], rows)


def _describe_machine(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    gpu = "" if environment["gpu"] is None else f" and {environment['gpu']}"
    return (
        f"{environment['processors']} processors ({environment['cpu']}){gpu}, {environment['system']}, "
        f"{environment['threads']} threads; {versions}"
    )


def _list_machines(results: Mapping[str, Any]) -> list[str]:
    """List the machines and versions of all results, each once."""
    parts = [cell[part] for cell in results["cells"].values() for part in ("times", "probes") if part in cell]
    parts += [results["imports"]] if "imports" in results else []
    return list(dict.fromkeys(_describe_machine(part["environment"]) for part in parts))


def format_tables(results: Mapping[str, Any]) -> str:
    """Format all tables of a suite, with the machine and the methods.

    Args:
        results: of a suite.

    Returns:
        Paragraphs of Markdown.
    """
    device = "" if results["device"] == "cpu" else f" --device {results['device']}"
    parts = [f"`python -m benchmarks run {results['suite']}{device}`, on {'; and on '.join(_list_machines(results))}."]
    timed = _select_cells(results, "times")
    if timed:
        rates = {name: 1e-9 / compute_seconds_per_byte(cell["memory"]) for name, cell in timed.items()}
        speeds = ", ".join(f"{rate:.3g} GB/s on {name}" for name, rate in rates.items())
        legend = "Ratios are medians over the paired rounds (quartiles in brackets); times are medians."
        parts.append(f"{legend} Memory bandwidth: {speeds}.")
        parts += [format_times(results, baseline) for baseline in results["baselines"]]
    probed = _select_cells(results, "probes")
    if probed:
        (how,) = {cell["memory"] for cell in probed.values()}
        parts += [f"Peak memory that a step adds: {how}.", format_memory(results)]
    if "imports" in results:
        seconds = ", ".join(f"`{module}` {seconds:.2g} s" for module, seconds in results["imports"]["seconds"].items())
        parts.append(f"Import, over the framework's own: {seconds}.")
    return "\n\n".join(parts)


def write_page(folder: Path, page: Path) -> None:
    """Draw the plots of all results in a folder, and write tables and plots into a page.

    A suite's section stays between `<!-- NAME -->` and `<!-- /NAME -->`, named after its file. A missing one is added at the
    page's end.

    Args:
        folder: of the JSON files and of the plots.
        page: the Markdown page; a missing page is created.

    Raises:
        ValueError: a section of the page begins and does not end.
    """
    for file in sorted(folder.glob("*.json")):
        results = json.loads(file.read_text(encoding="utf-8"))
        parts = [f"### {results['title']}{'' if results['device'] == 'cpu' else ', on a GPU'}", format_tables(results)]
        drawn = plots.draw_sweeps(results, folder / file.stem)
        parts += [format_image(plot.title, plot.path, page) for plot in drawn]
        replace_section(page, file.stem, parts)
