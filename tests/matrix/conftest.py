"""Start the matrix' workers, one process for each framework, and write the table of agreement at the end of the run."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from drivers.processes import run_python
from matrix import report, worker
from matrix.experiments import DATA_NEEDS, RUNNERS, missing, training

collect_ignore_glob = ["*_runners.py"]  # each needs its framework

_agreement = pytest.StashKey[dict[worker.Cell, float]]()
_outcomes = pytest.StashKey[dict[str, worker.Outcome]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--agreement", type=Path, help="put the matrix's table of what agreed, and to how much, into this page")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_agreement] = {}
    config.stash[_outcomes] = {}


def _start(name: str, folder: Path, data: Path) -> worker.Outcome:
    result = folder / f"{name}.pickle"
    done = run_python(
        name.removeprefix("keras-"),
        *("-c", "from matrix.worker import main; main()", name, str(data), str(result)),
        # The arrays are small, and the workers share the processors.
        OMP_NUM_THREADS="1",
        # The workers share the GPU too, where one is present.
        TF_FORCE_GPU_ALLOW_GROWTH="true",
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
    )
    assert done.returncode == 0, done.stdout
    return pickle.loads(result.read_bytes())


@pytest.fixture(scope="session")
def outcome(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], worker.Outcome]]:
    """Return a function that returns a worker's outcome.

    All workers that the chosen tests need start with the first test, two at a time.
    """
    folder = tmp_path_factory.mktemp("matrix")
    data = None if missing(DATA_NEEDS) else training()
    (folder / "data.pickle").write_bytes(pickle.dumps(data))
    chosen = [item.callspec.params["name"] for item in request.session.items if "outcome" in getattr(item, "fixturenames", ())]
    names = dict.fromkeys(RUNNERS[name].worker for name in chosen if not missing(RUNNERS[name].needs))
    done = request.config.stash[_outcomes]
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures: dict[str, Future[worker.Outcome]] = {}
        for name in names:
            if name == "numpy":
                done[name] = worker.work(name, data)
            else:
                futures[name] = pool.submit(_start, name, folder, folder / "data.pickle")

        def ask(name: str) -> worker.Outcome:
            if name not in done:
                done[name] = futures[name].result()
            return done[name]

        yield ask


@pytest.fixture(scope="session")
def agreement(request: pytest.FixtureRequest) -> dict[worker.Cell, float]:
    """Return the deviation of each cell, for the table."""
    return request.config.stash[_agreement]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    strayed, outcomes = config.stash[_agreement], config.stash[_outcomes]
    if not strayed:
        return
    terminalreporter.section("agreement")
    terminalreporter.write_line(report.table(strayed))
    for name, outcome in outcomes.items():
        seconds = ", ".join(f"{runner} {took:.1f} s" for runner, took in outcome.seconds.items())
        terminalreporter.write_line(f"{name}: {seconds}")
    path = config.getoption("--agreement", None)
    if path is not None:
        before = path.read_text(encoding="utf-8")
        path.write_text(report.page(before, strayed, outcomes.values()), encoding="utf-8")
        terminalreporter.write_line(f"written to {path}")
