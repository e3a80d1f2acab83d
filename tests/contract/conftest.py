"""The table of what each driver lacks, at the end of the run."""

from __future__ import annotations

import pytest
from drivers import list_gaps


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("drivers")
    for gap in list_gaps():
        terminalreporter.write_line(gap)
