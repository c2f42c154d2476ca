"""A report's tables on the console: the same cells as the page's."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from rich import table as rich_tables
from rich.text import Text

from megakd.pages.page import PAGE
from megakd.pages.tables import Cell, Table, signed
from megakd.runtime.console import plain
from megakd.study.report import appendix, page, tables
from megakd.study.report.records import records_of
from megakd.study.report.summary import Summary, labels
from megakd.study.results import Results, read_study


def conclude(folder: Path) -> None:
    """Print what the study in `folder` has found, and make its page there, or say in a line which library a page lacks.

    Raises ValueError as `read_study` and `page.make` do for everything else.
    """
    results = read_study(folder)
    show(results)
    try:
        page.make(results, folder, ["megakd", "report", str(folder)])
    except ValueError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        print(f"no {PAGE}: {error}")
    else:
        print(folder / PAGE)


def show(results: Results) -> None:
    """Print the tables of methods, of teachers and controls, of kinds of questions and of cost, then each gain by its values."""
    summary = Summary(results, tested=importlib.util.find_spec("scipy") is not None)
    records = {row.id: records_of(row) for row in results.rows}
    console = plain()
    shown = (tables.methods(summary), tables.references(summary), tables.families(summary), appendix.cost(summary, records))
    for of in shown:
        if of is not None and of.rows:
            console.print(_drawn(of))
    for line in gains(summary):
        print(line)


def gains(summary: Summary) -> Iterator[str]:
    """A line for each method, setting and score: the mean gain over no KD, with its interval and the gain of each seed."""
    for compared in summary.by_method:
        where = ", ".join(f"{axis} {value}" for axis, value in labels(compared.group.setting, summary.settings).items())
        for score in summary.results.scores:
            gain = compared.gains.get(score.path)
            if gain is None or gain.value is None:
                continue
            line = f"{compared.group.method} over {summary.results.plain}{f' ({where})' if where else ''}, {score.title}: "
            line += f"{signed(gain.value)} points"
            if gain.low is not None and gain.high is not None:
                line += f" (95% interval {signed(gain.low)} to {signed(gain.high)})"
            if gain.n > 1:
                line += f"; by seed {', '.join(map(signed, gain.by_seed.values()))}"
            yield line


def _drawn(of: Table) -> rich_tables.Table:
    drawn = rich_tables.Table(title=Text(of.title), caption=Text(of.caption), caption_justify="left")
    for column in of.columns:
        drawn.add_column(Text(column.title), justify="right" if column.numeric else "left")
    for row in of.rows:
        drawn.add_row(*map(_text, row))
    return drawn


def _text(cell: Cell) -> Text:
    text = cell.text + (f" ± {cell.spread}" if cell.spread else "") + (f" {cell.mark}" if cell.mark else "")
    return Text(text, style="bold" if cell.best else "")
