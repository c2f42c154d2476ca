"""The page of `megakd data check` in a real browser."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from megakd.cli import app
from megakd.data.check.cards import CardMaker
from support.browser import contrasts, page_of
from support.shards import Member, jpeg, open_shards, pair, write_set, write_tar

HOSTILE = [
    "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">",
    "'\"><style>body { display: none }</style> {{ 7 * 7 }} {% raw %}",
    "\x1b[31mred\x07 \u202egnp.exe\u2066 \ufffd",
    "long " * 100_000,
    "W" * 3000,
    "東京 — naïve \U0001f469\u200d\U0001f680",
    "</figcaption></figure></main></body></html>",
]


def members() -> list[Member]:
    made = [member for number in range(60) for member in pair(f"{number:03d}", number)]
    for number, text in enumerate(HOSTILE):
        made += [(f"hostile{number}.jpg", jpeg(100 + number, (120 + 9 * number, 90))), (f"hostile{number}.txt", text.encode())]
    made += [("same.jpg", jpeg(5)), ("same.txt", b"caption 5")]
    made += [("<b>&\u202e.jpg", jpeg(8)[:200]), ("<b>&\u202e.txt", b"broken")]
    made += [("blank.jpg", jpeg(9)), ("blank.txt", b"  ")]
    return made


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    path = write_tar(folder / "0.tar", members())
    told = CliRunner().invoke(app, ["data", "check", str(path), "--out", str(folder / "out")], catch_exceptions=False)
    assert told.exit_code == 1  # 2 of 70 are more than one in a hundred
    assert str(folder / "out" / "check.html") in told.stdout
    return folder / "out" / "check.html"


@pytest.fixture(scope="module")
def opened(browser: Any, page_file: Path) -> Iterator[Any]:
    with page_of(browser, page_file.as_uri()) as page:
        yield page


def test_nothing_runs_nothing_is_asked_for_and_nothing_is_complained_of(opened: Any, page_file: Path) -> None:
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert opened.title().startswith("Check of")
    assert opened.locator("script").count() == 0
    text = page_file.read_text(encoding="utf-8")
    assert "script-src" not in text
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in text


def test_captions_are_text_whatever_they_hold(opened: Any) -> None:
    said = opened.locator(".card p[dir=auto]").all_inner_texts()
    assert any("<script>document.title" in text for text in said)
    assert any("{{ 7 * 7 }}" in text for text in said)
    assert any(r"\x1b[31mred\x07 \u202egnp.exe\u2066" in text for text in said)
    assert any("… (499,999 characters)" in text for text in said)  # without white space at its end, as the histogram counts it
    assert not any(sign in opened.content() for sign in ("\x1b", "\u202e", "\x07"))
    assert opened.locator("h2").last.is_visible()


def test_images_are_inside_the_page_and_drawn(opened: Any) -> None:
    sizes = opened.eval_on_selector_all(".card img", "all => all.map((one) => [one.naturalWidth, one.naturalHeight])")
    assert len(sizes) > 60
    assert all(0 < width <= 160 and 0 < height <= 160 for width, height in sizes)


def test_what_there_is_to_look_at_is_there(opened: Any) -> None:
    titles = opened.locator("h3").all_inner_texts()
    assert {"Dropped", "The same image, 2 times", "The same caption, 2 times", "Longest captions", "Widest images"} <= set(titles)
    notes = opened.locator(".card .note").all_inner_texts()
    assert len(notes) == 2
    assert any(note.startswith("corrupt_image") for note in notes)
    assert any(note.startswith("empty_caption") for note in notes)
    assert opened.locator("#sheet ~ .cards .card, section:has(#sheet) .card").count() == 48


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_fits_and_is_read_at_every_width(opened: Any, width: int, scheme: str) -> None:
    opened.set_viewport_size({"width": width, "height": 800})
    opened.emulate_media(color_scheme=scheme)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    widths = opened.eval_on_selector_all(".card", "all => all.map((one) => one.scrollWidth - one.clientWidth)")
    assert max(widths) <= 0
    for selector in ("h1", ".verdict p", ".quiet", "td", "thead th", "nav a", ".card p", ".card .where", ".card .note", "dt"):
        assert contrasts(opened, selector)[0] >= 4.5, selector


def test_a_page_of_pictures_that_do_not_compress_stays_below_3_mb(tmp_path: Path) -> None:
    generator, made = np.random.default_rng(0), list[Member]()
    for number in range(40):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (160, 160, 3), dtype=np.uint8)).save(file, "JPEG", quality=95)
        text = ("&<\U000e0001" * 300 + f"{number}").encode()
        made += [member for copy in "abc" for member in ((f"{number:03d}{copy}.jpg", file.getvalue()), (f"{number:03d}{copy}.txt", text))]
    path = write_tar(tmp_path / "0.tar", made)
    told = CliRunner().invoke(app, ["data", "check", str(path), "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert told.exit_code == 0
    assert 1_500_000 < (tmp_path / "out" / "check.html").stat().st_size < 3_000_000


def test_thumbnails_that_there_is_no_room_for_are_left_out_and_counted_each_time(tmp_path: Path) -> None:
    shards = open_shards(write_set(tmp_path, 3, 1))
    one = len(CardMaker(shards, captions=True).card(0).source or "")
    maker = CardMaker(shards, captions=True, room=2 * one)
    assert [maker.card(0).source is not None for _ in range(4)] == [True, True, False, False]
    assert maker.left_out == 2
    assert maker.card(1).text == "caption 1"
