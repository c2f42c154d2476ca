"""The page of a run in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megakd.pages.run import page as run_page
from support.browser import contrasts, page_of
from support.run_pages import write_long_run
from support.runs import KD, TINY_LLAMA, answering, ran

LONG = "a_name_without_any_place_to_break_" * 8


@pytest.fixture(scope="module")
def addresses(recipe_file: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a real run with questions and neighbours, and of a long one that failed, whose names have no place to break."""
    folder = tmp_path_factory.mktemp("pages")
    decoder = (f"decoder.tokenizer={world}/tokenizer", f"decoder.architecture={TINY_LLAMA}")
    retrieval = f"evaluation.retrieval={{ test = '{world}/test/*.tar' }}"
    ran(recipe_file, folder / "real", *KD, *answering(world), *decoder, retrieval, "optim.steps=2", "optim.warmup=0")
    failed = {"time": "", "how": "failed", "words": f"error: {LONG}\nwith a second line"}
    starts = [{"from_step": 0}, {"from_step": 20, "nodes": LONG, "ended": failed}]
    write_long_run(folder / "failed", {"name": LONG, "data": {"train": LONG}}, jobs=starts, commit=LONG)
    for name in ("real", "failed"):
        run_page.make(folder / name, folder / name, ["megakd", "report", name], examples=True)
    return {name: (folder / name / "report.html").as_uri() for name in ("real", "failed")}


@pytest.fixture(params=["real", "failed"])
def opened(browser: Any, addresses: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Any]:
    with page_of(browser, addresses[request.param]) as page:
        page.named = request.param
        yield page


def test_nothing_is_said_on_the_console_nothing_is_asked_for_and_every_picture_is_drawn(opened: Any, addresses: dict[str, str]) -> None:
    opened.mouse.wheel(0, 30_000)
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [addresses[opened.named]]
    widths = opened.eval_on_selector_all("img", "all => all.map((one) => one.naturalWidth)")
    assert len(widths) >= 20 * (opened.named == "real")
    assert all(width > 0 for width in widths)


@pytest.mark.parametrize("width", [400, 900, 1400])
def test_the_page_fits_and_is_read_at_every_width_in_light_and_dark(opened: Any, width: int) -> None:
    """No sidewards scrolling but in a table's frame; figures and pictures in sight; contrast as WCAG's AA asks."""
    opened.set_viewport_size({"width": width, "height": 900})
    opened.eval_on_selector_all("details", "all => all.forEach((one) => { one.open = true; })")
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        for selector in (".verdict", ".answer p", ".scores b, h1", ".scores span, h1", ".checks li", ".cards dd, td", ".cards dt, td"):
            assert min(contrasts(opened, selector)) >= 4.5, selector
    boxes = opened.eval_on_selector_all("figure svg, img, .cards > li", "all => all.map((one) => one.getBoundingClientRect().toJSON())")
    assert len(boxes) > 8
    assert all(box["width"] > 40 and box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)


def test_what_became_of_the_run_its_scores_and_its_health_are_seen_without_scrolling(opened: Any) -> None:
    opened.set_viewport_size({"width": 1400, "height": 900})
    expected = {"real": "Finished: 2 steps", "failed": "Trained to step 40 of 40, and then failed"}
    assert opened.locator(".verdict").inner_text() == expected[opened.named]
    for selector in (".verdict", ".scores li", ".checks li"):
        box = opened.locator(selector).last.bounding_box()
        assert box["y"] + box["height"] <= 900, selector


def test_marks_are_told_to_those_who_hear_the_page_too(opened: Any) -> None:
    if opened.named == "failed":
        assert opened.locator(".checks li").first.text_content() == "✓good: Loss fell from 5.81 to 3.11"
    else:
        assert opened.locator("[data-cards=questions_0_even] dd").nth(1).text_content()[:3] in ("✓ g", "! t", "✗ w")


def test_paper_is_white_and_has_every_table_and_picture(opened: Any) -> None:
    opened.set_viewport_size({"width": 680, "height": 1000})  # A4 within its margins
    opened.emulate_media(media="print", color_scheme="dark")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.pdf(format="A4").startswith(b"%PDF")
    assert opened.locator("table[data-table=numbers]").is_visible()  # opened for the paper
    assert opened.evaluate("document.documentElement.scrollWidth") <= 680
