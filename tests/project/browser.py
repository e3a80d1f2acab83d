"""Measure pages in a headless Chromium, driven by the DevTools protocol over a pipe."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

#: Returns the tables, code blocks and pictures that a reader cannot see or scroll to the end of, with all tabs open.
_FIND_CUT_OFF = """
(() => {
  const edge = document.documentElement.clientWidth;
  const text = document.querySelector("article") ?? document.body;
  const found = [];
  document.querySelectorAll(".sd-tab-content").forEach((each) => (each.style.display = "block"));
  document.querySelectorAll("details").forEach((each) => (each.open = true));
  const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  const isCutOff = (element) => {
    let { left, right } = element.getBoundingClientRect();
    if (!scrolls(element)) right = Math.max(right, left + element.scrollWidth);
    for (let outer = element.parentElement; outer; outer = outer.parentElement) {
      if (getComputedStyle(outer).overflowX === "visible") continue;
      const box = outer.getBoundingClientRect();
      // What makes the theme scroll the whole text is cut off, too.
      if (text.contains(outer) && scrolls(outer)) ({ left, right } = box);
      else if (left < box.left - 1 || right > box.right + 1) return true;
    }
    return left < -1 || right > edge + 1;
  };
  for (const element of document.querySelectorAll("table, pre, img, svg, .sig")) {
    if (!element.checkVisibility() || element.closest(".sidebar-drawer, .toc-drawer, header")) continue;
    if (isCutOff(element)) found.push(`${element.tagName.toLowerCase()}: ${element.textContent.trim().slice(0, 60)}`);
  }
  for (const outer of [document.documentElement, document.querySelector(".content")]) {
    if (outer?.scrollWidth > outer?.clientWidth + 1) found.push(`the page is ${outer.scrollWidth} pixels wide`);
  }
  return found;
})()
"""


class Browser:
    """A running browser with one tab; a context manager.

    Args:
        program: the path of Chromium or Chrome.
        profile: an empty folder for the browser's files.
    """

    def __init__(self, program: str, profile: Path) -> None:
        from_us, self._to_browser = os.pipe()
        from_browser, to_us = os.pipe()
        self._numbers = itertools.count(1)
        self._session: dict[str, str] = {}

        def connect() -> None:
            """Move the browser's ends of the pipes to 3, which it reads, and 4, which it writes."""
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (from_us, to_us)]
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        # Containers often lack a sandbox, and the pages are ours.
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [program, *options, f"--user-data-dir={profile}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=connect,
            pass_fds=(3, 4),
        )
        os.close(from_us)
        os.close(to_us)
        self._answers = os.fdopen(from_browser, "rb")
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.call("Page.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to_browser)  # this ends the browser
        self._answers.close()
        self._process.wait(timeout=30)

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the protocol, and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": arguments, **self._session}
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, *, dark: bool = False) -> None:
        """Load a page in a window of some width and in the light or dark scheme."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def find_cut_off(self) -> list[str]:
        """Return the tables, code blocks and pictures of the open page that a reader cannot see or scroll to the end of."""
        found = self.call("Runtime.evaluate", expression=_FIND_CUT_OFF, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"]["value"]

    def _read(self) -> Any:
        message = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser ended"
            message += byte
        return json.loads(message)
