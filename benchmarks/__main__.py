"""The command line: `python -m benchmarks run SUITE`, `python -m benchmarks report`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from benchmarks import catalogue, measure, report, shapes, timing

_RESULTS = Path("docs/performance")
_PARTS = ("times", "probes", "imports")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = timing.Limits()

    run = commands.add_parser("run", help="measure a suite, and merge the results into a JSON file")
    run.add_argument("suite", choices=catalogue.SUITES)
    words = f"{', '.join(shapes.NAMED)}, a sweep ({', '.join(shapes.SWEEPS)}) or a point of one (tensors=30)"
    run.add_argument("--shapes", nargs="*", default=list(shapes.NAMED), metavar="SHAPE", help=words)
    run.add_argument("--parts", nargs="+", default=_PARTS, choices=_PARTS)
    run.add_argument("--competitors", nargs="+", metavar="NAME", help="run these and the baselines; default: all")
    run.add_argument("--rounds", type=int, default=defaults.rounds)
    run.add_argument("--seconds", type=float, default=defaults.competitor_seconds, help="for one competitor on one shape")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--output", type=Path, help="default: docs/performance/SUITE.json, or SUITE-cuda.json on a GPU")

    probe = commands.add_parser("probe", help="print one competitor's seconds for the first step and memory of a step")
    probe.add_argument("suite", choices=catalogue.SUITES)
    probe.add_argument("shape")
    probe.add_argument("competitor")
    probe.add_argument("--device", choices=("cpu", "cuda"), default="cpu")

    page = commands.add_parser("report", help="write tables and plots of all results into a page")
    page.add_argument("--results", type=Path, default=_RESULTS, help="the folder of the JSON files and of the plots")
    page.add_argument("--page", type=Path, default=_RESULTS.with_suffix(".md"))
    return parser


def main() -> None:
    """Run the command line."""
    parser = _parser()
    arguments = parser.parse_args()
    if getattr(arguments, "device", None) == "cpu":
        # Otherwise JAX and TensorFlow choose a GPU by themselves.
        os.environ.update(CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
    try:
        if arguments.command == "run":
            _run(arguments)
        elif arguments.command == "probe":
            (shape,) = shapes.parse(arguments.shape)
            loaded = catalogue.load_suite(arguments.suite)
            print(json.dumps(measure.probe_competitor(loaded, shape, arguments.competitor, arguments.device)))
        else:
            report.write_page(arguments.results, arguments.page)
    except ValueError as error:
        parser.error(str(error))


def _run(arguments: argparse.Namespace) -> None:
    name = arguments.suite if arguments.device == "cpu" else f"{arguments.suite}-{arguments.device}"
    output = arguments.output or _RESULTS / f"{name}.json"
    results = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    limits = timing.Limits(rounds=arguments.rounds, competitor_seconds=arguments.seconds)
    output.parent.mkdir(parents=True, exist_ok=True)
    what = (arguments.shapes, arguments.parts, arguments.competitors, arguments.device, limits)
    for found in measure.run_suite(arguments.suite, results, *what):
        # After each shape, because a run may take long.
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        results = found
    print(report.format_tables(results))


if __name__ == "__main__":
    main()
