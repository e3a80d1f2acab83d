"""What stands in more than one file must agree: versions, commands, dependencies."""

from __future__ import annotations

import io
import re
import tokenize
from importlib import metadata, resources
from pathlib import Path

import pytest

import vsgd

ROOT = Path(__file__).parents[1]


def readme_commands() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Two commands")[1].split("\n## ")[0]
    return re.findall(r"```sh\n(.*?)\n```", section, flags=re.DOTALL)


def test_ci_runs_the_readmes_test_command() -> None:
    quickstart, tests = readme_commands()
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert quickstart == f"{tests} -e quickstart"


def test_the_version_is_the_same_everywhere() -> None:
    assert metadata.version("vsgd") == vsgd.__version__
    assert f"\nversion: {vsgd.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_numpy_is_the_only_hard_dependency() -> None:
    requirements = metadata.requires("vsgd") or []
    assert [re.split("[^a-z]", each)[0] for each in requirements if "extra ==" not in each] == ["numpy"]


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("vsgd").joinpath("py.typed").is_file()


def code_lines(path: Path) -> int:
    """How many lines are neither blank, nor comments, nor docstrings."""
    lines: set[int] = set()
    statement: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NEWLINE:
            if [each.type for each in statement] != [tokenize.STRING]:
                lines.update(line for each in statement for line in range(each.start[0], each.end[0] + 1))
            statement = []
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            statement.append(token)
    return len(lines)


def test_the_example_of_a_backend_is_as_short_as_the_design_says() -> None:
    assert "it is under 100 lines that are neither blank" in (ROOT / "docs" / "design.md").read_text()
    assert sum(code_lines(ROOT / name) for name in ("vsgd/mlx.py", "tests/test_mlx.py")) < 100


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.is_file(), target
        if anchor:  # else it may be a picture
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], target
