"""How far what ran in several processes, on several devices or for long strayed from one plain run: the table at the end."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from scaling.ranks import Ranks


class Row(NamedTuple):
    """What ran, where, and how far it strayed, with the bound that the test asserts."""

    what: str
    where: str
    strayed: float
    bound: float


_rows = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scaling", type=Path, help="write the table of what was run, and how far it strayed, to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []


@pytest.fixture
def agreed(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Assert that a run strayed no further than a bound, and note it for the table."""

    def note(what: str, where: str, strayed: float, bound: float = 0.0) -> None:
        assert strayed <= bound, f"{what}, {where}: strayed by {strayed:.1e}, and {bound:.1e} is allowed"
        request.config.stash[_rows].append(Row(what, where, strayed, bound))

    return note


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """The pool of so many ranks of torch.distributed, one for all tests."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("no torch")
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    pools: dict[int, Ranks] = {}
    folder = tmp_path_factory.mktemp("ranks")
    yield lambda size: pools.setdefault(size, Ranks(size, folder))
    for pool in pools.values():
        pool.stop()


@pytest.fixture(scope="session")
def jax_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Ranks]]:
    """The pool of processes of JAX that has the devices of this name, one for all tests."""
    from scaling import jax_devices

    pools: dict[str, Ranks] = {}

    def pool(name: str) -> Ranks:
        if why := jax_devices.why_not(name):
            pytest.skip(why)
        if name not in pools:
            pools[name] = jax_devices.pool(name, tmp_path_factory.mktemp(name))
        return pools[name]

    yield pool
    for each in pools.values():
        each.stop()


@pytest.fixture(scope="session")
def jax_gpus(jax_pool: Callable[[str], Ranks]) -> tuple[Ranks, int]:
    """The process of JAX that has all GPUs, and how many they are."""
    from scaling import jax_devices

    (number,) = jax_pool("gpus").run(jax_devices.number, "gpu")
    if number == 0:
        pytest.skip("this JAX has no GPU")
    return jax_pool("gpus"), number


def table(rows: list[Row]) -> str:
    """A Markdown table, in the order of what ran; of rows that differ in nothing but how far they strayed, the farthest."""
    farthest: dict[tuple[str, str, float], float] = {}
    for row in sorted(rows):
        key = (row.what, row.where, row.bound)
        farthest[key] = max(farthest.get(key, 0.0), row.strayed)
    lines = ["| what ran | where | strayed by | bound |", "| --- | --- | --- | --- |"]
    for (what, where, bound), strayed in farthest.items():
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
