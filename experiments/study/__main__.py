"""The command line: `python -m experiments.study` does all missing runs and writes the pages; PART... does these parts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments import spread
from experiments.names import look_up
from experiments.study import protocol, rates, report, runs
from experiments.study.entrants import ENTRANTS
from experiments.study.protocol import Run

PARTS = ("selection", "edges", "untrained", "one-setting", "budget", "rates")
ALL = (*PARTS, "report")
_PAGES = Path("docs/results.md"), Path("docs/appendix.md")


def main(command: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        command: the arguments; None: the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(ALL)} (default: all but rates)")
    parser.add_argument("--entrants", nargs="+", default=list(ENTRANTS), choices=ENTRANTS, help="only these", metavar="NAME")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("docs/results/study"), help="the folder of the records")
    arguments = parser.parse_args(command)
    stores = {part: spread.Store(arguments.results / part) for part in PARTS}
    try:
        for part in arguments.parts:
            look_up("part", part, dict.fromkeys(ALL))
        for part in arguments.parts or [each for each in ALL if each != "rates"]:
            if part == "report":
                finds = {name: store.find for name, store in stores.items()}
                report.write_pages(finds, protocol.choose_settings(finds["selection"]), *_PAGES, arguments.results)
            else:
                wanted = (run for run in _list_runs(part, stores) if run.entrant in arguments.entrants)
                runs.perform_missing(wanted, stores[part], arguments.workers, part)
    except ValueError as error:
        parser.error(str(error))


def _list_runs(part: str, stores: Mapping[str, spread.Store]) -> Iterator[Run]:
    if part == "selection":
        yield from protocol.list_selection_runs()
    elif part == "untrained":
        yield from protocol.list_untrained_runs()
    elif part in ("edges", "one-setting"):
        settings = protocol.choose_settings(stores["selection"].find)
        if part == "edges":
            yield from protocol.list_edge_runs(settings)
        else:
            yield from (run for name in ENTRANTS for run in protocol.list_one_setting_runs(name, settings[name]))
    else:
        list_runs = {"budget": protocol.list_budget_runs, "rates": rates.list_rate_runs}[part]
        yield from (run for name in ENTRANTS for run in list_runs(name))


if __name__ == "__main__":
    main()
