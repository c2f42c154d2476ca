"""How figures are drawn and written: as SVG that takes the page's colours, and as SVG and PNG files on white.

Colours of a drawing are those of the light page. In the page's own SVG each becomes a variable of the stylesheet, which has another value
for dark screens.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.runtime.extras import library
from megakd.runtime.files import atomic_file

INK, MUTED, LINE = "#1b2127", "#5b6670", "#dde2e6"
# Apart for every common kind of colour blindness, and in grey by their markers; the eighth is the last, then lines become dashed.
SERIES = ("#0b6cb0", "#c9510c", "#00805a", "#a8327a", "#94690a", "#3c8fc4", "#6a4fa3", "#6f7780")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
# Of the markers, about (15, 7), for legends in the page.
_OUTLINES = {
    "o": "M11 7a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "s": "M11.4 3.4h7.2v7.2h-7.2z",
    "^": "M15 2.6l4.4 8h-8.8z",
    "D": "M15 2.2l4.8 4.8-4.8 4.8-4.8-4.8z",
    "v": "M15 11.4l4.4-8h-8.8z",
    "P": "M13.3 2.6h3.4v2.7h2.7v3.4h-2.7v2.7h-3.4v-2.7h-2.7v-3.4h2.7z",
    "X": "M11.2 4.9l2-2 1.8 1.8 1.8-1.8 2 2-1.9 2.1 1.9 2.1-2 2-1.8-1.8-1.8 1.8-2-2 1.9-2.1z",
    "*": "M15 1.8l1.5 3.7 4 .3-3.1 2.5 1 3.9-3.4-2.1-3.4 2.1 1-3.9-3.1-2.5 4-.3z",
}
_SWATCH = '<svg viewBox="0 0 30 14" aria-hidden="true">'
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", **{colour: f"--s{place}" for place, colour in enumerate(SERIES, 1)}}
_FONT = "'DejaVu Sans', sans-serif"
WIDTH, HEIGHT = 4.4, 3.2  # inches of 72 units; a panel is shown about as wide as a phone
LONGEST_LABEL = 26  # characters


@dataclass(frozen=True)
class Figure:
    """key: its file's name. alt: what it shows, for those who do not see it. legend: (label, place of its colour; None for no KD)."""

    key: str
    title: str
    alt: str
    draw: Callable[[Any], None]
    legend: tuple[tuple[str, int | None], ...] = ()
    width: float = WIDTH
    height: float = HEIGHT


def matplotlib() -> Any:
    """The library, without a display. Raises ValueError, naming the extra that brings it, where it is not installed."""
    found = library("matplotlib", "a report's figures need", "study")
    library("matplotlib.figure", "a report's figures need", "study")
    return found


def style(place: int | None) -> dict[str, Any]:
    """Of the line of a series; None: without a teacher."""
    if place is None:
        return {"color": MUTED, "marker": ".", "linestyle": "--", "markersize": 5.5, "linewidth": 1.2}
    turn = place // len(SERIES)
    dash, marker = DASHES[turn % len(DASHES)], MARKERS[place % len(MARKERS)]
    return {"color": colour(place), "marker": marker, "linestyle": dash, "markersize": 4.5}


def colour(place: int) -> str:
    return SERIES[place % len(SERIES)]


def short(label: str) -> str:
    """A name that fits beside an axis."""
    label = " ".join(label.split())
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"


def swatch(place: int | None) -> str:
    """The <svg> of a legend's entry in the page; None: the line of no KD."""
    if place is None:
        return f'{_SWATCH}<path d="M0 7H30" stroke="var(--muted)" stroke-width="1.6" stroke-dasharray="5 3"/></svg>'
    look, tint = style(place), f"var(--s{place % len(SERIES) + 1})"
    dashes = {"-": "", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}[look["linestyle"]]
    line = f'<path d="M0 7H30" stroke="{tint}" stroke-width="2" stroke-dasharray="{dashes}"/>'
    return f'{_SWATCH}{line}<path d="{_OUTLINES[look["marker"]]}" fill="{tint}"/></svg>'


def page_svg(figure: Figure) -> str:
    """The <svg> element for the page: text as text, colours as variables, no size but its view box, ids that no other figure has."""
    text = io.StringIO()
    with _drawn(figure, legend=False) as canvas:
        canvas.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[A-Za-z0-9_.]+_\d+">', "<g>", svg)
    svg = re.sub(r'^<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg)
    svg = svg.replace("xlink:href", "href").replace(_FONT, "var(--sans)")
    for value, variable in _VARIABLES.items():
        svg = re.sub(rf"(fill|stroke): {value}", rf"\1: var({variable})", svg)
    return svg.strip()


def write(figure: Figure, folder: Path, kinds: Sequence[str]) -> list[str]:
    """KEY.svg or KEY.png in `folder`, or both, on white and with a legend. Returns their names."""
    metadata: dict[str, dict[str, None]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
    with _drawn(figure, legend=True) as canvas:
        for kind in kinds:
            with atomic_file(folder / f"{figure.key}.{kind}") as partial:
                canvas.savefig(partial, format=kind, facecolor="white", dpi=200, metadata=metadata[kind])
    return [f"{figure.key}.{kind}" for kind in kinds]


@contextmanager
def _drawn(figure: Figure, *, legend: bool) -> Iterator[Any]:
    library = matplotlib()
    settings = {
        "text.parse_math": False,  # names are names, even with a $ in them
        "svg.fonttype": "none",
        "svg.hashsalt": figure.key,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "sans-serif"],
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.labelsize": 9,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": LINE,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "lines.linewidth": 1.6,
    }
    # warnings: of the families that are named for browsers, and of letters that the PNG's font lacks
    with library.rc_context(settings), warnings.catch_warnings(), _quiet_fonts():
        warnings.simplefilter("ignore")
        extra = 0.17 * ((len(figure.legend) + 1) // 2) if legend and figure.legend else 0.0
        canvas = library.figure.Figure(figsize=(figure.width, figure.height + extra + 0.25 * legend), layout="constrained")
        axes = canvas.add_subplot()
        figure.draw(axes)
        if legend:
            canvas.suptitle(short_title(figure.title), color=INK, x=0.015, ha="left", fontsize=9.5)
            if figure.legend:
                handles = [_handle(library, place, label) for label, place in figure.legend]
                canvas.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        canvas.draw_without_rendering()  # lays out, which every savefig would do again
        canvas.set_layout_engine("none")
        yield canvas


def short_title(title: str) -> str:
    return title if len(title) <= 60 else f"{title[:59]}…"


def _handle(library: Any, place: int | None, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=short(label).lstrip("_") or "?", **style(place))  # matplotlib leaves out what begins with _


@contextmanager
def _quiet_fonts() -> Iterator[None]:
    """findfont reports each family that is not installed to the log."""
    import logging

    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
