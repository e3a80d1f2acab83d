"""Run functions in pools of processes, and write how far their results deviate from one plain run in a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scaling import ranks

#: The largest deviation, by what ran, where, and the bound that the test asserts.
Rows = dict[tuple[str, str, float], float]
_rows = pytest.StashKey[Rows]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scaling", type=Path, help="write the table of what was run, and how far it strayed, to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = {}


@pytest.fixture
def agreed(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that asserts that a run deviates by at most a bound, and records the deviation for the table."""

    def note(what: str, where: str, strayed: float, bound: float = 0.0) -> None:
        assert strayed <= bound, f"{what}, {where}: strayed by {strayed:.1e}, and {bound:.1e} is allowed"
        rows, key = request.config.stash[_rows], (what, where, bound)
        rows[key] = max(rows.get(key, 0.0), strayed)

    return note


@pytest.fixture(scope="session")
def on() -> Iterator[Callable[..., list[Any]]]:
    """Return `on(pool, "module.function", *args)`, which starts a pool if needed and returns the result of each process."""
    pools: dict[str, ranks.Ranks] = {}

    def run(name: str, function: str, *args: Any) -> list[Any]:
        if why := ranks.why_not(name):
            pytest.skip(why)
        if name not in pools:
            pools[name] = ranks.Ranks(name)
        framework = name.split()[0].removeprefix("keras-")
        if "gpu" in name and 0 in pools[name].run("ranks.count_gpus", framework):
            pytest.skip(f"no GPU that {framework} can use")
        return pools[name].run(function, *args)

    yield run
    for pool in pools.values():
        pool.stop()


def table(rows: Rows) -> str:
    """Return a Markdown table, sorted by what ran."""
    lines = ["| what ran | where | strayed by | bound |", "| --- | --- | --- | --- |"]
    for (what, where, bound), strayed in sorted(rows.items()):
        lines.append(f"| {what} | {where} | {_figure(strayed)} | {_figure(bound)} |")
    return "\n".join(lines) + "\n"


def _figure(strayed: float) -> str:
    return f"{strayed:.1e}" if strayed else "0, bit for bit"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.stash[_rows]:
        return
    terminalreporter.section("scaling")
    terminalreporter.write_line(table(config.stash[_rows]))
    path = config.getoption("--scaling", None)
    if path is not None:
        path.write_text(table(config.stash[_rows]), encoding="utf-8")
        terminalreporter.write_line(f"written to {path}")
