"""The command line: `python -m experiments COMMAND`; `python -m experiments --help` lists the commands."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from experiments import comparison, datasets, paper, paper_report, records, tasks

_RESULTS, _PAGE = Path("docs/results"), Path("docs/appendix.md")
_BACKENDS = ("tensorflow", "jax", "torch")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("list", help="print the experiments and the optimizers")

    run = commands.add_parser("run", help="do or resume one run; a finished run is not repeated")
    run.add_argument("experiment", help="see list")
    run.add_argument("--optimizer", required=True, help="see list")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--learning-rate", type=float, help="instead of the paper's")
    run.add_argument("--weight-decay", type=float, help="instead of the paper's")
    run.add_argument("--iterations", type=int, help="instead of the paper's")
    run.add_argument("--batch-size", type=int, help="instead of the paper's")
    run.add_argument("--evaluate-every", type=int, help="steps between two tests and two checkpoints; default: the paper's")
    _add_run_options(run)

    every = commands.add_parser("paper", help="do all missing runs of the paper, then report")
    every.add_argument("--experiments", nargs="+", default=list(paper.EXPERIMENTS), help="only these", metavar="NAME")
    every.add_argument("--seeds", type=int, default=paper.SEEDS, help="how many, from 0")
    every.add_argument("--page", type=Path, default=_PAGE)
    _add_run_options(every)

    compare = commands.add_parser("compare", help="do all missing runs on the small tasks, tuning first")
    compare.add_argument(
        "--tasks", nargs="+", default=list(tasks.TASKS), help="only these; NAME@4 is 4 times as long", metavar="NAME"
    )
    compare.add_argument(
        "--entrants",
        nargs="+",
        default=list(comparison.ENTRANTS),
        help="only these; NAME:kappa1=0.6,kappa2=0.7 has other hyperparameters",
        metavar="NAME",
    )
    _add_worker_options(compare)

    page = commands.add_parser("report", help="write tables and curves of all results into a page")
    page.add_argument("--results", type=Path, default=_RESULTS, help="the folder of the records and of the plots")
    page.add_argument("--page", type=Path, default=_PAGE)

    sweep = commands.add_parser("sweep", help="do all missing runs of VSGD's grids, and write their tables into a page")
    _add_worker_options(sweep)
    sweep.add_argument("--page", type=Path, default=_PAGE)

    check = commands.add_parser(
        "recommended", help="do all missing runs of the recommended setting, and write their tables into a page"
    )
    _add_worker_options(check)
    check.add_argument("--page", type=Path, default=_PAGE)

    pack = commands.add_parser("pack", help="compress the records in a folder; commands go on to read them")
    pack.add_argument("folder", type=Path)

    layers = commands.add_parser("layers", help="train with VSGD, and write tables of each tensor's state into a page")
    layers.add_argument("--backend", choices=_BACKENDS, default="jax", help="of Keras (default: %(default)s)")
    layers.add_argument("--page", type=Path, default=_PAGE)
    return parser


def _add_worker_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--backend", choices=_BACKENDS, default="jax", help="of Keras (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="the folder of the records of finished runs")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=_BACKENDS, help="of Keras; default: Keras' own setting")
    parser.add_argument("--data-dir", type=Path, help="a folder with the published archives; default: download them")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="the folder of the records of finished runs")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="the folder that gets a folder for each run")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard files into the run's folder")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")


def main(command: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        command: the arguments; None: the process's own.
    """
    parser = _parser()
    arguments = parser.parse_args(command)
    if getattr(arguments, "backend", None):
        os.environ["KERAS_BACKEND"] = arguments.backend  # before Keras is imported
    try:
        _COMMANDS[arguments.command](arguments)
    except (ImportError, ValueError) as error:
        parser.error(str(error))


def _print_list(arguments: argparse.Namespace) -> None:
    print(paper.format_overview())
    print(comparison.format_overview())


def _run_one(arguments: argparse.Namespace) -> None:
    hyper = {} if arguments.weight_decay is None else {"weight_decay": arguments.weight_decay}
    chosen = paper.make_settings(
        arguments.experiment,
        arguments.optimizer,
        arguments.seed,
        learning_rate=arguments.learning_rate,
        iterations=arguments.iterations,
        batch_size=arguments.batch_size,
        evaluate_every=arguments.evaluate_every,
        hyper=hyper,
    )
    _run_all([chosen], arguments)


def _run_paper(arguments: argparse.Namespace) -> None:
    # All optimizers with one seed first, so that the table fills evenly; one data set after the other, to save memory.
    chosen = [
        paper.make_settings(experiment, optimizer, seed)
        for seed in range(arguments.seeds)
        for experiment in arguments.experiments
        for optimizer in paper.COMPARED
    ]
    _run_all(chosen, arguments)
    paper_report.write_page(arguments.results, arguments.page)


def _run_all(every: Sequence[paper.Settings], arguments: argparse.Namespace) -> None:
    from experiments import training  # late: it imports Keras, whose backend must be chosen first

    if arguments.tensorboard and find_spec("tensorflow") is None:
        raise ValueError("--tensorboard is set, but Keras needs TensorFlow to write the files: pip install tensorflow")
    finished = records.Records(arguments.results / paper_report.FILE)
    for data in dict.fromkeys(paper.EXPERIMENTS[chosen.experiment].data for chosen in every):
        archive = datasets.find_archive(data, arguments.data_dir)
        images = None
        for chosen in every:
            if paper.EXPERIMENTS[chosen.experiment].data != data:
                continue
            what = f"{chosen.experiment}, {chosen.optimizer}, seed {chosen.seed}"
            if chosen.make_key(training.BACKEND, archive.digest) in finished:
                print(f"{what}: already finished")
                continue
            if images is None:
                images = archive.read()
            print(what)
            verbose = 0 if arguments.quiet else 1
            options = {"verbose": verbose, "tensorboard": arguments.tensorboard}
            record = training.run_training(chosen, images, archive.digest, finished, arguments.output, **options)
            print(f"{what}: test accuracy {100 * record['curve']['test_accuracy'][-1]:.2f} %")


def _run_comparison(arguments: argparse.Namespace) -> None:
    from experiments import spread  # late: it needs more packages than the paper's experiments

    store = spread.Store(arguments.results / spread.FOLDER)
    spread.run_comparison(arguments.tasks, arguments.entrants, store, arguments.workers, arguments.backend)


def _write_report(arguments: argparse.Namespace) -> None:
    from experiments import report  # likewise

    paper_report.write_page(arguments.results, arguments.page)
    report.write_page(arguments.results, arguments.page)


def _run_sweep(arguments: argparse.Namespace) -> None:
    from experiments import sweep  # likewise

    sweep.run_sweep(arguments.results, arguments.page, arguments.workers, arguments.backend)


def _run_check(arguments: argparse.Namespace) -> None:
    from experiments import recommended  # likewise

    recommended.run_check(arguments.results, arguments.page, arguments.workers, arguments.backend)


def _pack_records(arguments: argparse.Namespace) -> None:
    from experiments import spread  # likewise

    spread.Store(arguments.folder).pack()


def _write_layers(arguments: argparse.Namespace) -> None:
    from experiments import layers  # late: it imports Keras, whose backend must be chosen first

    layers.write_page(arguments.page, arguments.backend)


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "list": _print_list,
    "run": _run_one,
    "paper": _run_paper,
    "compare": _run_comparison,
    "report": _write_report,
    "sweep": _run_sweep,
    "recommended": _run_check,
    "pack": _pack_records,
    "layers": _write_layers,
}

if __name__ == "__main__":
    main()
