"""The command line: `python -m experiments.study PART`, of selection, edges, untrained, one-setting, budget, rates, report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments import spread
from experiments.study import protocol, rates, report, runs
from experiments.study.entrants import ENTRANTS

PARTS = ("selection", "edges", "untrained", "one-setting", "budget", "rates")
_PAGES = Path("docs/results.md"), Path("docs/appendix.md")


def main(command: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        command: the arguments; None: the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__)
    parser.add_argument("part", choices=(*PARTS, "report"))
    parser.add_argument("--entrants", nargs="+", default=list(ENTRANTS), choices=ENTRANTS, help="only these", metavar="NAME")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("docs/results/study"), help="the folder of the records")
    arguments = parser.parse_args(command)
    stores = {part: spread.Store(arguments.results / part) for part in PARTS}
    try:
        if arguments.part == "report":
            finds = {part: store.find for part, store in stores.items()}
            report.write_pages(finds, protocol.choose_settings(finds["selection"]), *_PAGES, arguments.results)
            return
        if arguments.part in ("selection", "untrained"):
            chosen = {"selection": protocol.list_selection_runs, "untrained": protocol.list_untrained_runs}[arguments.part]()
        elif arguments.part == "edges":
            chosen = protocol.list_edge_runs(protocol.choose_settings(stores["selection"].find))
        elif arguments.part == "one-setting":
            settings = protocol.choose_settings(stores["selection"].find)
            chosen = (run for name in arguments.entrants for run in protocol.list_one_setting_runs(name, settings[name]))
        else:
            list_runs = {"budget": protocol.list_budget_runs, "rates": rates.list_rate_runs}[arguments.part]
            chosen = (run for name in arguments.entrants for run in list_runs(name))
        wanted = (run for run in chosen if run.entrant in arguments.entrants)
        runs.perform_missing(wanted, stores[arguments.part], arguments.workers, arguments.part)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
