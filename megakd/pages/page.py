"""A page as report.html, report.md and figures/: what it is made of, and how it is written.

The page is one file: its stylesheet, its script, its figures and its pictures are inside, and its Content-Security-Policy lets a browser
load nothing else. Names in it come from people and recipes; Jinja escapes them, and nothing that they hold is taken as markup.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.pages import drawing, markdown, tables
from megakd.pages.drawing import Figure
from megakd.pages.tables import Table
from megakd.runtime.extras import library
from megakd.runtime.files import atomic_file, check_place, write_text
from megakd.version import __version__

PAGE, MARKDOWN, FIGURES = "report.html", "report.md", "figures"
HERE = Path(__file__).parent
GOOD, LOOK, BAD = "good", "look", "bad"  # how something is, beside its words
MARKS = {GOOD: "✓", LOOK: "!", BAD: "✗", "": ""}


@dataclass(frozen=True)
class Figures:
    """Figures beside each other, with one legend for all. small: more of them in a row."""

    title: str
    caption: str
    figures: tuple[Figure, ...]
    small: bool = False


@dataclass(frozen=True)
class Picture:
    """key: its file's name. jpeg: its bytes. note: below it; mark: GOOD, LOOK, BAD or ""."""

    key: str
    jpeg: bytes
    alt: str
    note: str = ""
    mark: str = ""

    @property
    def file(self) -> str:
        return f"{self.key}.jpg"


@dataclass(frozen=True)
class Line:
    """text under a term; mark: GOOD, LOOK, BAD or ""."""

    term: str
    text: str
    mark: str = ""


@dataclass(frozen=True)
class Card:
    """One example: the picture that it is about, lines, and pictures that were found for it."""

    picture: Picture | None
    lines: tuple[Line, ...]
    found: tuple[Picture, ...] = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return (*((self.picture,) if self.picture else ()), *self.found)


@dataclass(frozen=True)
class Cards:
    """Examples beside each other."""

    key: str
    title: str
    caption: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. mark: GOOD, LOOK or BAD."""

    mark: str
    what: str
    said: str


Part = Table | Figures | Cards


@dataclass(frozen=True)
class Section:
    """facts: terms with what they are, set as code."""

    key: str
    title: str
    parts: tuple[Part, ...] = ()
    texts: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """question: below the title. verdict: a few words, of which `tone` (GOOD, LOOK, BAD or "") is the colour; sentences: what it rests on.
    scores: (number, what it is), large. facts: (number, what it counts). command: makes the page again.
    """

    title: str
    question: str
    verdict: str
    sentences: tuple[str, ...]
    sections: tuple[Section, ...]
    command: str
    facts: tuple[tuple[str, str], ...] = ()
    scores: tuple[tuple[str, str], ...] = ()
    checks: tuple[Check, ...] = ()
    tone: str = ""

    def parts(self) -> Iterator[Part]:
        for section in self.sections:
            yield from section.parts

    def figures(self) -> list[Figure]:
        return [figure for part in self.parts() if isinstance(part, Figures) for figure in part.figures]

    def pictures(self) -> list[Picture]:
        return [picture for part in self.parts() if isinstance(part, Cards) for card in part.cards for picture in card.pictures]


def section(
    key: str, title: str, *parts: Part | None, texts: tuple[str, ...] = (), facts: tuple[tuple[str, str], ...] = ()
) -> Section | None:
    """Of the parts that have something in them; None where there is nothing to show."""
    there = tuple(part for part in parts if part is not None and _fills(part))
    texts = tuple(filter(None, texts))
    return Section(key, title, there, texts, facts) if there or texts or facts else None


def _fills(part: Part) -> bool:
    return bool(part.rows if isinstance(part, Table) else part.figures if isinstance(part, Figures) else part.cards)


def check_out(out: Path, ours: re.Pattern[str]) -> None:
    """Before anything expensive. ours: names of files in figures/ that an earlier page of this kind may have left.

    Raises ValueError where `out` cannot be written to or has other files in figures/, and where a library of the extra "study" is missing.
    """
    library("jinja2", "a report's page needs", "study")
    drawing.matplotlib()
    check_place(out, "--out")
    if others := sorted(name for name in _there(out) if not ours.fullmatch(name)):
        raise ValueError(f"--out {out}: {out / FIGURES} holds files that no report wrote ({', '.join(others[:3])}); choose another --out")


def write(page: Page, out: Path, *, kinds: tuple[str, ...]) -> None:
    """The page's files in the folder `out`, which `check_out` has passed. kinds: of its figures' files, "svg" and "png"."""
    before, folder = _there(out), out / FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    written = {name for figure in page.figures() for name in drawing.write(figure, folder, kinds)}
    for picture in page.pictures():
        with atomic_file(folder / picture.file) as partial:
            partial.write_bytes(picture.jpeg)
        written.add(picture.file)
    for name in set(before) - written:
        (folder / name).unlink()
    write_text(out / MARKDOWN, as_markdown(page))
    write_text(out / PAGE, as_html(page))


def _there(out: Path) -> list[str]:
    return [path.name for path in (out / FIGURES).iterdir()] if (out / FIGURES).is_dir() else []


def as_markdown(page: Page) -> str:
    """The page's text, tables and links to its figures."""
    text = markdown.escaped
    parts = [f"# {text(page.title)}", text(page.question), f"**{text(page.verdict)}.** {text(' '.join(page.sentences))}"]
    parts.append("\n".join(f"- {text(what)}: **{text(number)}**" for number, what in page.scores))
    parts.append("\n".join(f"- {MARKS[check.mark]} {text(check.what)}: {text(check.said)}" for check in page.checks))
    parts.append(", ".join(f"{text(number)} {text(what)}" for number, what in page.facts))
    for of in page.sections:
        parts.append(f"## {text(of.title)}")
        parts += map(text, of.texts)
        parts.append("\n".join(f"- {text(term)}: {text(said)}" for term, said in of.facts))
        for part in of.parts:
            if isinstance(part, Table):
                parts.append(markdown.table(part, headed=part.title != of.title))
            elif isinstance(part, Cards):
                parts += [f"### {text(part.title)}", text(part.caption), *map(_card, part.cards)]
            else:
                parts += [f"### {text(part.title)}"] if part.title else []
                parts.append(text(part.caption))
                parts += [f"![{text(figure.title)}]({FIGURES}/{figure.key}.svg)" for figure in part.figures]
    return "\n\n".join(filter(None, parts)) + "\n"


def _card(card: Card) -> str:
    text = markdown.escaped
    pictures = [f"![{text(one.alt)}]({FIGURES}/{one.file}) {text(one.note)} {MARKS[one.mark]}".rstrip() for one in card.pictures]
    lines = [f"{text(line.term)}: {text(line.text)} {MARKS[line.mark]}".rstrip() for line in card.lines]
    return "\n".join(f"{'  ' if place else '- '}{line}" for place, line in enumerate((*pictures, *lines)))


def as_html(page: Page) -> str:
    """The whole file. Raises ValueError where Jinja is missing."""
    jinja2 = library("jinja2", "a report's page needs", "study")
    import markupsafe

    trusted = markupsafe.Markup  # of our own files and of matplotlib's SVG, which escapes what it is given
    script, css = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    sections = [{**vars(of), "parts": [_in_html(part, trusted) for part in of.parts]} for of in page.sections]
    return str(
        environment.get_template("page.html.j2").render(
            page={**vars(page), "sections": sections},
            css=trusted(css),
            script=trusted(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=__version__,
            up=tables.UP,
            marks=MARKS,
            said={GOOD: "good", LOOK: "to be looked at", BAD: "wrong"},
            pictures=bool(page.pictures()),
            address=_address,
        )
    )


def _address(picture: Picture) -> str:
    """Of a picture that is in the page itself."""
    return f"data:image/jpeg;base64,{base64.b64encode(picture.jpeg).decode()}"


def _in_html(part: Part, trusted: Any) -> dict[str, Any]:
    if isinstance(part, Table):
        return {"kind": "table", "of": part}
    if isinstance(part, Cards):
        return {"kind": "cards", "of": part}
    legend = dict(entry for figure in part.figures for entry in figure.legend)
    panels = [{**vars(figure), "svg": trusted(drawing.page_svg(figure))} for figure in part.figures]
    swatches = [(label, trusted(drawing.swatch(place))) for label, place in legend.items()]
    return {"kind": "figures", "title": part.title, "caption": part.caption, "legend": swatches, "figures": panels, "small": part.small}
