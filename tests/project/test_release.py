"""Test that the release checks fail when they should."""

from __future__ import annotations

import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from release import smoke, tag, trials  # noqa: E402

RELEASED = "# Changelog\n\n## [0.2.0] - 2027-01-31\n\n### Added\n\n## [0.1.0] - 2026-12-31\n"


@pytest.mark.parametrize(
    ("name", "changelog", "said"),
    [
        ("v0.2.1", RELEASED, "tag is 'v0.2.1', but must be 'v0.2.0'"),
        ("0.2.0", RELEASED, "tag is '0.2.0', but must be 'v0.2.0'"),
        (
            "v0.2.0",
            RELEASED.replace("0.2.0", "0.3.0"),
            r"begins with '\[0.3.0\] - 2027-01-31', but must begin with '\[0.2.0\] - Y",
        ),
        ("v0.2.0", RELEASED.replace("- 2027-01-31", ""), r"begins with '\[0.2.0\] '"),
        ("v0.2.0", RELEASED.replace("# Changelog", "## [Unreleased]"), r"begins with '\[Unreleased\]'"),
        ("v0.2.0", "# Changelog\n", "begins with ''"),
    ],
)
def test_a_tag_that_does_not_fit_is_refused(name: str, changelog: str, said: str) -> None:
    tag.check("v0.2.0", "0.2.0", RELEASED)
    with pytest.raises(ValueError, match=said):
        tag.check(name, "0.2.0", changelog)


def test_every_extra_but_the_developers_is_tried_out() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert trials.TRIALS.keys() == extras.keys() - {"all", "dev", "docs", "tests"} | {""}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return an unpacked sdist with two modules."""
    folder, sdist = tmp_path / "vsgd-0.2.0", tmp_path / "vsgd-0.2.0.tar.gz"
    (folder / "vsgd" / "backends").mkdir(parents=True)
    for name in (*MODULES, "pyproject.toml"):
        (folder / name).touch()
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(folder, folder.name)
    return trials.unpack(sdist, tmp_path / "elsewhere")


MODULES = ("vsgd/__init__.py", "vsgd/backends/__init__.py")


def test_a_wheel_has_the_package_alone(source: Path, tmp_path: Path) -> None:
    def check(*names: str) -> None:
        wheel = tmp_path / "vsgd-0.2.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in ("vsgd-0.2.0.dist-info/METADATA", *names):
                archive.writestr(name, "")
        trials.check_contents(wheel, source)

    check(*MODULES)
    with pytest.raises(ValueError, match=r"differ in tests/conftest\.py"):
        check(*MODULES, "tests/conftest.py")
    with pytest.raises(ValueError, match=r"differ in vsgd/backends/__init__\.py"):
        check(MODULES[0])


def test_steps_that_follow_the_authors_code_pass_and_others_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    smoke.check_steps("numpy")
    follow = smoke.ADAPTERS["numpy"]
    monkeypatch.setitem(smoke.ADAPTERS, "strayed", lambda given: follow(given._replace(lr=given.lr * (1 + 1e-8))))
    with pytest.raises(AssertionError, match="strayed"):
        smoke.check_steps("strayed")


def test_a_package_from_elsewhere_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smoke.vsgd, "__file__", str(tmp_path / "vsgd" / "__init__.py"))
    with pytest.raises(AssertionError, match="vsgd was imported from"):
        smoke.check_installation("0.2.0")
