"""What stands in more than one file must agree: versions, commands, dependencies."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from project import commands
from project.pages import PAGES

import vsgd

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def pinned(file: str) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return {each.name: each for each in map(Requirement, filter(None, lines))}


def frameworks() -> dict[str, Requirement]:
    """NumPy and what the adapters' extras add, as pyproject.toml bounds them."""
    adapters = (PROJECT["optional-dependencies"][extra] for extra in ("torch", "fused", "keras", "mlx", "optax"))
    requirements = map(Requirement, [*PROJECT["dependencies"], *(each for extra in adapters for each in extra)])
    return {each.name: each for each in requirements if each.name != "vsgd"}


def bound(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == ">="
    return specifier.version


def table(page: str) -> Iterator[list[str]]:
    """The rows of a page's tables, headings too."""
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def readme_commands() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Two commands")[1].split("\n## ")[0]
    return re.findall(r"```sh\n(.*?)\n```", section, flags=re.DOTALL)


def test_ci_runs_the_readmes_test_command() -> None:
    quickstart, tests = readme_commands()
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()
    assert f"run: {tests}" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert quickstart == f"{tests} -e quickstart"


def test_ci_runs_all_other_environments_too() -> None:
    label = re.search(r"labels = full = (.+)", (ROOT / "tox.ini").read_text())[1].split(", ")
    assert ".venv/bin/python -m tox run -m full" in (ROOT / ".ci" / "run").read_text().splitlines()
    jobs = re.search(r"environment: \[(.+)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())[1].split(", ")
    assert jobs == [*label, "oldest"]


def test_the_version_is_the_same_everywhere() -> None:
    assert metadata.version("vsgd") == vsgd.__version__
    assert f"\nversion: {vsgd.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_numpy_is_the_only_hard_dependency() -> None:
    requirements = metadata.requires("vsgd") or []
    assert [re.split("[^a-z]", each)[0] for each in requirements if "extra ==" not in each] == ["numpy"]


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("vsgd").joinpath("py.typed").is_file()


def test_the_oldest_versions_are_those_that_are_required() -> None:
    pins = pinned("constraints-oldest.txt")
    for name, requirement in frameworks().items():
        oldest = Version(str(pins[name].specifier).removeprefix("=="))
        required = Version(bound(requirement))
        assert oldest.release[: len(required.release)] == required.release, name


def test_the_page_on_support_tells_the_oldest_versions() -> None:
    told = {name: oldest for name, oldest, _ in table("docs/support.md") if re.fullmatch(r"[\d.]+", oldest)}
    python = PROJECT["requires-python"].removeprefix(">=")
    assert told == {"Python": python, **{name: bound(each) for name, each in frameworks().items()}}


def test_pythons_are_the_same_everywhere() -> None:
    prefix = "Programming Language :: Python :: 3."
    classified = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if each.startswith(prefix)]
    matrix = re.search(r"python-version: \[(.+)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert re.findall(r"[\d.]+", matrix[1]) == classified
    (said,) = [note for name, _, note in table("docs/support.md") if name == "Python"]
    assert re.findall(r"[\d.]+", said) == classified
    assert PROJECT["requires-python"] == f">={classified[0]}"


def test_the_nightly_run_takes_pre_releases_of_each_framework() -> None:
    nightly = pinned("constraints-nightly.txt")
    assert nightly.keys() == pinned("constraints-oldest.txt").keys()
    assert all(each.specifier.prereleases for each in nightly.values())


@pytest.mark.parametrize("file", [*PAGES, *WORKFLOWS], ids=lambda file: file.name)
def test_commands_in_running_text_and_workflows_name_what_exists(file: Path) -> None:
    for command in re.findall(r"(?:`|run: )((?:python|tox) [^`\n]+)", file.read_text()):
        assert commands.absent(command) == []


def test_all_workflows_and_forms_are_linted() -> None:
    linted = (ROOT / "tox.ini").read_text().split("[testenv:lint]")[1].split("\n[")[0].split()
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert not {path.relative_to(ROOT).as_posix() for path in (*WORKFLOWS, *forms)} - set(linted)


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs").rglob("*.ipynb"))], ids=lambda page: page.name)
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


def public_names(path: Path) -> set[str]:
    """A module's `__all__`, without an import, for its framework may be missing."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    told = dict(re.findall(r"automodule:: ([\w.]+)\n   :members: (.+)", text))
    files = (path for path in (ROOT / "vsgd").rglob("*.py") if "backends" not in path.parts)
    public = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): names
        for path in files
        if (names := public_names(path))
    }
    assert len(public) >= 9
    for module, names in public.items():
        assert names == set(told[module].split(", ")), module
