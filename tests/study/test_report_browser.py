"""The page of a report in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from megakd.study import found_runs
from megakd.study.report import page as report_page
from support.browser import contrasts, page_of
from support.study_folders import write_study

WIDTHS = (400, 900, 1400)


def score(teacher: str | None, method: str, seed: int) -> float:
    """Gains that are alike in all seeds but for a hair, so that some are significant."""
    strength = int(teacher[-1]) if teacher else 0
    return 0.4 + 0.01 * strength * len(method) % 0.3 + 0.002 * seed + 1e-7 * seed * len(method)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a page with everything on it: a failed cell with a long message, a very long name, methods beyond the colours."""
    methods = ("similarity", "patch", "a method whose name is longer than any column of a table should ever be", "x" * 300, *"abcdefg")
    more = {"hypotheses": [{"name": "h", "prediction": "it rises", "measure": "order", "threshold": 0.8, "verdict": None}]}
    folder = write_study(
        tmp_path_factory.mktemp("page") / "study", score, methods=methods, seeds=2, more=more,
        status=lambda teacher, method, seed: ("failed", "error: " + "very_long_word" * 40) if method == "b" and seed else ("done", ""),
    )  # fmt: skip
    report_page.make(found_runs.read([folder]), folder, ["megakd", "report", "study"])
    return (folder / "report.html").as_uri()


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Any]:
    with page_of(browser, address) as page:
        yield page


def test_what_is_marked_is_told_to_those_who_hear_the_page_too(opened: Any) -> None:
    marked = opened.locator("table[data-table=methods] td:has(.mark)")
    assert marked.count() > 3
    assert "above the method without a teacher, p = 0.0" in marked.first.text_content()


def test_nothing_is_said_on_the_console_and_nothing_else_is_asked_for(opened: Any, address: str) -> None:
    opened.mouse.wheel(0, 20_000)
    assert opened.said == []
    assert opened.asked == [address]


def _values(page: Any, table: str, column: int) -> list[float | None]:
    read = "(rows, column) => rows.map((row) => row.cells[column].dataset.value ?? null)"
    values = page.eval_on_selector_all(f"table[data-table={table}] tbody tr", read, column)
    return [None if value is None else float(value) for value in values]


def test_a_table_sorts_by_each_head_and_what_is_missing_comes_last(opened: Any) -> None:
    heads = opened.locator("table[data-table=methods] thead th")
    for column in (2, 3):  # the main score, and the gain, which the first row has not
        before = _values(opened, "methods", column)
        known = sorted((value for value in before if value is not None), reverse=True)
        missing = [None] * (len(before) - len(known))
        head = heads.nth(column)
        assert head.get_attribute("aria-sort") == "none"
        head.locator("button").click()
        assert (_values(opened, "methods", column), head.get_attribute("aria-sort")) == ([*known, *missing], "descending")
        head.locator("button").press("Enter")  # without a mouse
        assert (_values(opened, "methods", column), head.get_attribute("aria-sort")) == ([*known[::-1], *missing], "ascending")
    assert [heads.nth(column).get_attribute("aria-sort") for column in range(4)] == ["none", "none", "none", "ascending"]
    heads.nth(0).locator("button").click()
    names = opened.locator("table[data-table=methods] tbody th").all_inner_texts()
    assert names == sorted(names, key=str.lower)


def test_without_scripts_everything_but_sorting_is_there(browser: Any, address: str) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(address)
    assert page.locator("thead button").count() == 0
    assert page.locator("table[data-table=methods] tbody tr").count() == 12
    page.locator("details summary").first.click()
    assert page.locator("table[data-table=combinations]").is_visible()
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_is_read_at_every_width(opened: Any, width: int, scheme: str) -> None:
    """No sidewards scrolling but in a table's frame; every figure in sight, with letters of 8 px or more; contrast as WCAG's AA asks."""
    opened.set_viewport_size({"width": width, "height": 800})
    opened.emulate_media(color_scheme=scheme)
    opened.eval_on_selector_all("details", "all => all.forEach((one) => { one.open = true; })")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    figures = opened.locator("figure")
    assert figures.count() == 7
    for number in range(figures.count()):
        box = figures.nth(number).locator("svg").bounding_box()
        assert box["width"] > 250
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    letters = opened.eval_on_selector_all("figure svg text", "all => all.map((one) => one.getBoundingClientRect().height)")
    assert min(letters) >= 8
    for selector in ("h1", ".question", ".answer p", ".caption", "td", "thead th", "nav a", "figure svg text"):
        assert contrasts(opened, selector)[0] >= 4.5, selector


def test_paper_is_white_without_what_is_for_screens_and_with_every_table(opened: Any) -> None:
    opened.set_viewport_size({"width": 680, "height": 1000})  # A4 within its margins
    opened.emulate_media(media="print", color_scheme="dark")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not opened.locator("nav").is_visible()
    printed = opened.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert opened.locator("table[data-table=rows]").is_visible()  # opened for the paper
    assert opened.evaluate("document.documentElement.scrollWidth") <= 680
