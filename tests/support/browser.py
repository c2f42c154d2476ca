"""Pages in a real browser: Debian's Chromium, driven by playwright. BROWSER_TESTS=require makes its absence a failure."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")


@contextlib.contextmanager
def started() -> Iterator[Any]:
    """The browser. Skips the test, or fails it, where there is none."""
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("BROWSER_TESTS") == "require" else pytest.skip)("needs Debian's package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # CI runs as root
        yield browser
        browser.close()


@contextlib.contextmanager
def page_of(browser: Any, address: str) -> Iterator[Any]:
    """A page; what the console says and what is asked for are in its lists `said` and `asked`."""
    page = browser.new_page()
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    yield page
    page.close()


def contrasts(page: Any, selector: str) -> list[float]:
    """Of each such element's letters with the first ground behind it that is not transparent (WCAG 2.1)."""
    return page.eval_on_selector_all(
        selector,
        """(all) => all.map((one) => {
          const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
              .map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const look = getComputedStyle(one);
          let ground = one;
          while (["rgba(0, 0, 0, 0)", "transparent"].includes(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
          const pair = [light(one instanceof SVGElement ? look.fill : look.color), light(getComputedStyle(ground).backgroundColor)];
          return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        })""",
    )
