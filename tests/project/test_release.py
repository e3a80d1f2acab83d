"""What a release must pass says no where it should."""

from __future__ import annotations

import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from release import smoke, tag, trials  # noqa: E402

RELEASED = "# Changelog\n\n## [0.2.0] - 2027-01-31\n\n### Added\n\n## [0.1.0] - 2026-12-31\n"


def test_a_tag_that_fits_is_taken() -> None:
    tag.check("v0.2.0", "0.2.0", RELEASED)


@pytest.mark.parametrize(
    ("name", "version", "changelog", "said"),
    [
        ("v0.2.1", "0.2.0", RELEASED, "tag is 'v0.2.1', but must be 'v0.2.0'"),
        ("0.2.0", "0.2.0", RELEASED, "tag is '0.2.0', but must be 'v0.2.0'"),
        ("v0.1.0", "0.1.0", RELEASED, r"begins with '\[0.2.0\] - 2027-01-31', but must begin with '\[0.1.0\] - YYYY-MM-DD'"),
        ("v0.2.0", "0.2.0", RELEASED.replace("- 2027-01-31", ""), r"begins with '\[0.2.0\] '"),
        ("v0.2.0", "0.2.0", RELEASED.replace("# Changelog", "## [Unreleased]"), r"begins with '\[Unreleased\]'"),
        ("v0.2.0", "0.2.0", "# Changelog\n", "begins with ''"),
    ],
)
def test_a_tag_that_does_not_fit_is_refused(name: str, version: str, changelog: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tag.check(name, version, changelog)


def test_every_extra_but_the_developers_is_tried_out() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert trials.TRIALS.keys() == extras.keys() - {"all", "dev", "docs", "tests"} | {""}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An unpacked sdist of two modules."""
    folder = tmp_path / "vsgd-0.2.0"
    (folder / "vsgd" / "backends").mkdir(parents=True)
    for name in ("vsgd/__init__.py", "vsgd/backends/__init__.py", "pyproject.toml"):
        (folder / name).touch()
    return folder


def wheel(folder: Path, *names: str) -> Path:
    path = folder / "vsgd-0.2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("vsgd-0.2.0.dist-info/METADATA", *names):
            archive.writestr(name, "")
    return path


def test_a_wheel_has_the_package_alone(source: Path, tmp_path: Path) -> None:
    files = ("vsgd/__init__.py", "vsgd/backends/__init__.py")
    trials.check_contents(wheel(tmp_path, *files), source)
    with pytest.raises(ValueError, match=r"differ in tests/conftest\.py"):
        trials.check_contents(wheel(tmp_path, *files, "tests/conftest.py"), source)
    with pytest.raises(ValueError, match=r"differ in vsgd/backends/__init__\.py"):
        trials.check_contents(wheel(tmp_path, *files[:1]), source)


def test_an_sdist_is_unpacked(source: Path, tmp_path: Path) -> None:
    sdist = tmp_path / f"{source.name}.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(source, source.name)
    assert (trials.unpack(sdist, tmp_path / "elsewhere") / "vsgd" / "__init__.py").is_file()


def test_steps_that_follow_the_authors_code_pass() -> None:
    smoke.check_steps("numpy")


def test_steps_that_stray_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def strayed(given: smoke.Trajectory) -> Iterator[list[np.ndarray]]:
        yield from smoke.ADAPTERS["numpy"](given._replace(lr=given.lr * (1 + 1e-8)))

    monkeypatch.setitem(smoke.ADAPTERS, "strayed", strayed)
    with pytest.raises(AssertionError, match="strayed"):
        smoke.check_steps("strayed")


def test_a_package_from_elsewhere_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smoke.vsgd, "__file__", str(tmp_path / "vsgd" / "__init__.py"))
    with pytest.raises(AssertionError, match="vsgd was imported from"):
        smoke.check_installation("0.2.0")
