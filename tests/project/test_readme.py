"""Test that the README's tables agree with the pages and records that they come from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from research.scripts import need

need("matplotlib", "scipy", "tqdm")

from reporting.examples import load_example  # noqa: E402
from reporting.pages import replace_section  # noqa: E402

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_is_as_its_script_writes_it(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    shutil.copy(README, page)
    for section in ("agreement", "speed", "results"):
        replace_section(page, section, ["old"])
    load_example("../docs/readme").write_tables(page)
    assert page.read_text(encoding="utf-8") == README.read_text(encoding="utf-8")
    # Check that all sections exist, because the script adds missing ones.
    assert re.findall(r"<!-- (\w+) -->", page.read_text(encoding="utf-8")) == ["results", "speed", "agreement"]
