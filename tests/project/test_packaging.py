"""Test that versions, commands and dependencies that occur in several files agree."""

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
    """Return the requirements of NumPy and of the adapters' extras, as bounded in pyproject.toml."""
    adapters = (PROJECT["optional-dependencies"][extra] for extra in ("torch", "fused", "keras", "mlx", "optax"))
    requirements = map(Requirement, [*PROJECT["dependencies"], *(each for extra in adapters for each in extra)])
    return {each.name: each for each in requirements if each.name != "vsgd"}


def bound(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == ">="
    return specifier.version


def table(page: str) -> Iterator[list[str]]:
    """Yield the rows of a page's tables, including headings."""
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_ci_runs_the_readmes_test_command_and_all_other_environments() -> None:
    section = (ROOT / "README.md").read_text().split("## Two commands")[1].split("\n## ")[0]
    quickstart, tests = re.findall(r"```sh\n(.*?)\n```", section, flags=re.DOTALL)
    ours, workflow = (ROOT / ".ci" / "run").read_text().splitlines(), (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert {tests, ".venv/bin/python -m tox run-parallel -p 2 --parallel-no-spinner -m full"} <= set(ours)
    assert f"run: {tests}" in workflow
    assert quickstart == f"{tests} -e quickstart"
    label = re.search(r"labels = full = (.+)", (ROOT / "tox.ini").read_text())[1].split(", ")
    assert re.search(r"environment: \[(.+)\]", workflow)[1].split(", ") == [*label, "oldest"]


def test_the_package_has_one_version_numpy_alone_as_a_dependency_and_types() -> None:
    assert metadata.version("vsgd") == vsgd.__version__
    assert f"\nversion: {vsgd.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    requirements = metadata.requires("vsgd") or []
    assert [re.split("[^a-z]", each)[0] for each in requirements if "extra ==" not in each] == ["numpy"]
    assert resources.files("vsgd").joinpath("py.typed").is_file()


def test_the_constraints_and_the_page_on_support_have_the_versions_that_are_required() -> None:
    oldest, nightly = pinned("constraints-oldest.txt"), pinned("constraints-nightly.txt")
    required = {name: bound(requirement) for name, requirement in frameworks().items()}
    for name, version in required.items():
        release = Version(version).release
        assert Version(str(oldest[name].specifier).removeprefix("==")).release[: len(release)] == release, name
    assert nightly.keys() == oldest.keys()
    assert all(each.specifier.prereleases for each in nightly.values())
    shown = {name: version for name, version, _ in table("docs/support.md") if re.fullmatch(r"[\d.]+", version)}
    assert shown == {"Python": PROJECT["requires-python"].removeprefix(">="), **required}


def test_pythons_are_the_same_everywhere() -> None:
    prefix = "Programming Language :: Python :: 3."
    classified = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if each.startswith(prefix)]
    matrix = re.search(r"python-version: \[(.+)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert re.findall(r"[\d.]+", matrix[1]) == classified
    (said,) = [note for name, _, note in table("docs/support.md") if name == "Python"]
    assert re.findall(r"[\d.]+", said) == classified
    assert PROJECT["requires-python"] == f">={classified[0]}"


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
        if anchor:  # without an anchor it may be a picture
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], target


def public_names(path: Path) -> set[str]:
    """Return a module's `__all__` without importing it, because its framework may be missing."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_the_reference_has_every_public_name() -> None:
    text = "".join(page.read_text() for page in sorted((ROOT / "docs" / "reference").glob("*.md")))
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
