"""From patterns of shards to what is said of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from megakd.data.caption_tokens import Tokenize
from megakd.data.captions import CaptionPolicy
from megakd.data.check import page
from megakd.data.check.measure import TokenCounter, measure
from megakd.data.check.summary import Summary, summarise
from megakd.data.check.tables import all_tables, bars, share
from megakd.data.shards import ShardSet
from megakd.data.storage import shown
from megakd.recipe import Data
from megakd.recipe.credentials import redact
from megakd.runtime.console import plain
from megakd.runtime.files import check_place, write_text

PAGE, NUMBERS = "check.html", "check.json"


@dataclass(frozen=True)
class CheckRequest:
    """data: with the shards in `train`. tokenize: of the student, None without texts; words: what it is, for people.

    captions: whether a run reads them. batch: of the recipe, None without one. samples: how many are read, None for all. out: folder of
    the page and the numbers.
    """

    data: Data
    tokenize: Tokenize | None
    words: str
    captions: bool
    batch: int | None
    samples: int | None
    out: Path | None


def check(request: CheckRequest, *, as_json: bool) -> bool:
    """Print what is in the shards; whether a run would train on them.

    Raises ValueError for shards that cannot be opened, which a run would refuse as well, and for an --out that cannot be written to.
    """
    data = request.data
    assert data.train is not None
    if request.samples is not None and request.samples < 1:
        raise ValueError(f"--samples {request.samples}: read one at least, or leave it out to read all")
    if request.out is not None:
        check_place(request.out, "--out")
        page.jinja()
    shards = ShardSet.open_set(data.train, data, 0, 1, lambda: None, captions=request.captions, policy=CaptionPolicy.of(data))
    count = len(shards) if request.samples is None else min(request.samples, len(shards))
    index_N = np.arange(count) * len(shards) // count
    counter = None if request.tokenize is None or not request.captions else TokenCounter(request.tokenize)
    measured = measure(shards, index_N, counter, request.captions)
    summary = summarise(shards, index_N, measured, counter, request.captions, request.batch)
    verdict, facts = _verdict(summary), _facts(request, shards, summary)
    content = summary.to_json(shards)
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        html = page.as_html(_title(data), verdict, facts, summary, shards, measured.unusable, request.captions)
        write_text(request.out / PAGE, html)
        write_text(request.out / NUMBERS, json.dumps(content, indent=1) + "\n")
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        _show(summary, shards, verdict, facts)
        if request.out is not None:
            print(f"{request.out / PAGE}: the same with a contact sheet; {request.out / NUMBERS}")
    return not summary.refusals


def _amount(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _title(data: Data) -> str:
    named: list[str] = [data.train] if isinstance(data.train, str) else list(data.train or [])  # of a table its sources
    return "Check of " + shown(redact(", ".join(named[:3])))[:300] + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def _verdict(summary: Summary) -> str:
    read = _amount(len(summary.index_N), "sample") + ("" if summary.is_whole else " that were read")
    lost = f", and {summary.lost:,} more are lost" if summary.lost else ""
    would = "refuse" if summary.refusals else "train on"
    return f"A run would {would} this: {len(summary.usable_N):,} of {read} can be used{lost}."


def _facts(request: CheckRequest, shards: ShardSet, summary: Summary) -> list[str]:
    size = sum(stat.size for stat in shards.stats)
    of = f"{_amount(len(shards.names), 'shard')} with {_amount(summary.samples, 'sample')}, {size / 1e9:,.3g} GB."
    read = (
        "All were read"
        if summary.is_whole
        else f"{len(summary.index_N):,} were read, evenly spaced (--samples); shares are estimates by these"
    )
    limit = request.data.max_bad_fraction
    known, bad = summary.known, summary.bad
    facts = [
        f"{of} {read}.",
        *(
            f"{name}: {numbers['samples']:,} samples, {numbers['share']:.2%} of each batch; {numbers['usable']:,} of {numbers['read']:,} "
            "that were read can be used."
            for name, numbers in summary.by_source(shards).items()
        ),
        f"data.max_bad_fraction = {limit}: {share(known.total, known.seen)} are unusable by the indexes, "
        f"{share(bad.total, bad.seen)} by reading.",
    ]
    if request.captions:
        where = f"{shards.captions.spelled_members} members" if shards.captions.is_single else f"drawn: {shards.captions}"
        clean = f", cleaned by {', '.join(request.data.clean)} (data.clean)" if request.data.clean else ""
        facts.append(f"Captions are {where}{clean}; tokens are counted by {request.words}.")
    else:
        facts.append("The recipe's objectives and teachers read no captions, and neither does this check.")
    return facts


def _show(summary: Summary, shards: ShardSet, verdict: str, facts: list[str]) -> None:
    console = plain(80)
    for table in all_tables(summary, shards):
        drawn = Table(title=table.title, title_justify="left", caption=table.caption, caption_justify="left")
        for number, column in enumerate(table.columns):
            drawn.add_column(column, justify="left" if number == 0 or column in table.texts else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*map(Text, row))  # a name may look like rich's markup
        console.print(drawn)
    for name, histogram in summary.histograms.items():
        counted = ", ".join(f"{label}: {count:,}" for label, count in bars(histogram) if count)
        console.print(f"{name}: {counted}")
    for line in (*facts, verdict, *summary.refusals):
        console.print(line)
