"""Test that the built site cuts off no table, code block or picture, on a phone and on a wide screen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fcntl", reason="the browser is driven over pipes as on Unix")

from project.browser import Browser

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDE = "<div style='width: 900px'>wide</div>"


@pytest.fixture(scope="module")
def site(pytestconfig: pytest.Config) -> Path:
    found: Path | None = pytestconfig.getoption("--site")
    if found is None:
        pytest.skip("no built documentation: --site names its folder")
    return found


@pytest.fixture(scope="module")
def browser(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    # Start a browser only if there is a site, so that only one environment starts one.
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium or Chrome, which measures the pages")
    with Browser(program, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.mark.parametrize("width", [400, 1440])
def test_nothing_on_the_site_is_cut_off(width: int, browser: Browser, site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert site / "index.html" in pages
    cut_off = {}
    for page in pages:
        browser.open(page, width)
        cut_off[page.relative_to(site).as_posix()] = browser.find_cut_off()
    assert {page: found for page, found in cut_off.items() if found} == {}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (f"<table><td>{WIDE}</table>", ["table: wide", "the page is"]),
        (f"<div style='overflow-x: auto'><table><td>{WIDE}</table></div>", []),
        (f"<div style='overflow-x: hidden'><table><td>{WIDE}</table></div>", ["table: wide"]),
        (f"<div style='overflow-x: auto; width: 600px'><table><td>{WIDE}</table></div>", ["table: wide", "the page is"]),
        (f"<pre style='overflow-x: hidden'>{WIDE}</pre>", ["pre: wide"]),
        (f"<pre style='overflow-x: auto'>{WIDE}</pre>", []),
        (f"<div class='sd-tab-content' style='display: none'><pre>{WIDE}</pre></div>", ["pre: wide", "the page is"]),
        ("<table><td>narrow</table>", []),
    ],
)
def test_what_is_cut_off_is_found(body: str, found: list[str], browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!DOCTYPE html>{body}", encoding="utf-8")
    browser.open(page, width=400)
    measured = browser.find_cut_off()
    assert len(measured) == len(found)
    assert all(map(str.startswith, measured, found))
