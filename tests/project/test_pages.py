"""Test that no snippet or command on the pages escapes the tests of `pages.py`."""

from __future__ import annotations

import re
import textwrap
from configparser import ConfigParser
from pathlib import Path

import pytest
from project import commands, pages
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer

INCLUDES = {"literalinclude", "include", "eval-rst", "toctree", "tab-set", "tab-item"}
NO_CODE = {"text", "bibtex"}

every_page = pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)


def fences(page: Path) -> list[tuple[str, str, str]]:
    """Return language or directive, argument and text of each fenced block, found by separate rules."""
    pattern = r"^( *)```(?:\{([\w-]+)\}|(\w*)) ?(.*)\n((?:.*\n)*?)\1```$"
    matches = re.finditer(pattern, page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [(match[2] or match[3], match[4], textwrap.dedent(match[5])) for match in matches]


@every_page
def test_every_snippet_is_run_or_looked_up_and_none_hides_in_an_indented_block(page: Path) -> None:
    assert {kind for kind, _, _ in fences(page)} <= {"diff", "python", "sh"} | INCLUDES | NO_CODE
    found = [example.parsed for example in pages.snippets.parse(page)]
    assert all(text in found for kind, _, text in fences(page) if kind in ("diff", "python", "sh"))
    command = rf"^ {{4}}(?:{'|'.join(commands.PROGRAMS)})3? .*"
    assert re.findall(command, page.read_text(encoding="utf-8"), flags=re.MULTILINE) == []


@every_page
def test_a_snippet_is_skipped_for_want_of_packages_alone_that_one_environment_requires(page: Path) -> None:
    tox = ConfigParser(interpolation=None)
    tox.read(pages.ROOT / "tox.ini", encoding="utf-8")
    required = set(re.search(r'--require "(.+?)[;"]', tox["all"]["pytest"])[1].split(","))
    for region in DirectiveInHTMLCommentLexer("skip")(pages.snippets.parse(page)):
        if region.lexemes["arguments"] != "end":
            condition = re.fullmatch(r"(?:start|next) if\(missing\((.+)\)\)", region.lexemes["arguments"])
            assert condition, region.lexemes["arguments"]
            assert {name.strip(' "') for name in condition[1].split(",")} <= required


@every_page
def test_files_that_pages_show_are_run_by_tests(page: Path) -> None:
    modules = {path: path.read_text(encoding="utf-8") for path in (pages.ROOT / "tests").rglob("*.py")}
    for kind, target, _ in fences(page):
        file = (page.parent / target).resolve()
        if kind == "literalinclude" and not file.is_relative_to(pages.ROOT / "vsgd"):
            assert [path for path, text in modules.items() if path != file and re.search(rf"\b{file.stem}\b", text)]


@pytest.mark.parametrize(
    ("script", "absent"),
    [
        ("KERAS_BACKEND=jax python examples/keras_training.py --epochs 3  # a comment", []),
        ("python3 -m venv .venv && .venv/bin/python -m pip install tox && .venv/bin/python -m tox run -e quickstart", []),
        ("torchrun --standalone examples/torch_distributed.py \\\n  --die-at 90", []),
        ("python -m benchmark report", ["benchmark"]),
        ("python -m benchmarks run torch --part times", ["--part"]),
        ("python examples/quick.py", ["examples/quick.py"]),
        ("python -m pytest tests/matrices --agreement docs/agreement.md", ["tests/matrices"]),
        ("pip install '.[torch,trosch]' jax\ntox run -e keras-jax,quick", ["trosch", "quick"]),
        ("tox run -e keras-numpy", ["keras-numpy"]),
        ("make all", ["make"]),
    ],
)
def test_commands_are_looked_up(script: str, absent: list[str]) -> None:
    assert commands.absent(script) == absent
