"""The page of a check: one file without a script, in which a browser loads and runs nothing.

Names and captions are anybody's. Jinja escapes them, what is not printable is shown by its escape, and the Content-Security-Policy allows
the page's own stylesheet, by its digest, and images that are inside it.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from megakd.data.bad_samples import BadSample
from megakd.data.check import cards
from megakd.data.check.summary import Summary
from megakd.data.check.tables import all_tables, bars
from megakd.data.shards import ShardSet
from megakd.runtime.extras import library
from megakd.version import __version__

_HERE = Path(__file__).parent


def jinja() -> Any:
    """The library. Raises ValueError, with the way to install it, where it is not there."""
    return library("jinja2", "a check's page (--out) needs", "study")


def as_html(
    title: str, verdict: str, facts: list[str], summary: Summary, shards: ShardSet, unusable: list[tuple[int, BadSample]], captions: bool
) -> str:
    """The page, below 3 MB. unusable: some of the samples that cannot be used."""
    css = (_HERE / "page.css").read_text(encoding="utf-8")
    jinja2 = jinja()
    import markupsafe

    maker = cards.CardMaker(shards, captions)
    remarkable, sheet = cards.groups(maker, summary, unusable)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return str(
        environment.get_template("page.html.j2").render(
            title=title,
            verdict=verdict,
            refusals=summary.refusals,
            facts=facts,
            tables=all_tables(summary, shards),
            histograms=[(name, bars(one), max(1, *one.counts)) for name, one in summary.histograms.items()],
            remarkable=remarkable,
            sheet=sheet,
            left_out=maker.left_out,
            css=markupsafe.Markup(css),  # our own file
            css_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
            version=__version__,
        )
    )
