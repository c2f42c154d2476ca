"""A page's tables as Markdown: the same cells as the page's."""

from __future__ import annotations

import re

from megakd.pages.tables import Cell, Table

# An underscore inside a word is none of Markdown's; what begins a heading, a list or a quotation does so at the start alone.
_SPECIAL = re.compile(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[#+>=-])")


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, one line."""
    one_line = " ".join(text.split())
    return _SPECIAL.sub(r"\\\1", one_line.replace("&", "&amp;").replace("<", "&lt;"))


def table(of: Table, *, headed: bool) -> str:
    """A pipe table; headed: under its title."""
    head = "| " + " | ".join(escaped(column.title) for column in of.columns) + " |"
    rule = "|" + "|".join("---:" if column.numeric else "---" for column in of.columns) + "|"
    rows = ["| " + " | ".join(map(_cell, row)) + " |" for row in of.rows]
    title = (f"### {escaped(of.title)}", "") if headed else ()
    return "\n".join((*title, escaped(of.caption), "", head, rule, *rows))


def _cell(cell: Cell) -> str:
    text = escaped(cell.text) + (f" ± {cell.spread}" if cell.spread else "")
    text = f"**{text}**" if cell.best else text
    return f"{text} {cell.mark}" if cell.mark else text
