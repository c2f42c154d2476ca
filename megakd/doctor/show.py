"""`megakd doctor`: the findings as a table a topic, or as JSON; the exit code."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megakd.doctor.examine import PROBES, TOPICS, Examined, examine
from megakd.doctor.finding import Place
from megakd.recipe.credentials import redact, redacted
from megakd.runtime.console import plain
from megakd.runtime.exits import EXIT_UNFIT
from megakd.version import __version__

EXPECTED_SECONDS = 20.0
STYLES = {"ok": "green", "slow": "yellow", "partly": "yellow", "fails": "bold red"}
NAME_WIDTH = max(len(probe.name) for probe in PROBES)


def run(place: Place, topics: Sequence[str], *, as_json: bool) -> int:
    """Look, say what was found, and return 0 where training would work, EXIT_UNFIT where something that it needs fails.

    Raises ValueError for an unknown topic.
    """
    began = time.perf_counter()
    examined = examine(place, topics or TOPICS)
    console = plain()
    done: list[Examined] = []
    for one in examined:
        done.append(one)
        if not as_json:
            _show(console, one, headed=len(done) == 1 or done[-2].topic != one.topic)
    seconds = time.perf_counter() - began
    failing = [f"{one.topic}.{finding.name}" for one in done for finding in one.findings if finding.mark == "fails"]
    if as_json:
        print(json.dumps(_content(done, seconds, works=not failing), indent=1))
    else:
        console.print("\n" + redact(_verdict(done, seconds, failing)))
    return EXIT_UNFIT if failing else 0


def _show(console: Console, one: Examined, *, headed: bool) -> None:
    """The rows of one probe as soon as they are there; `headed`: under their topic."""
    if headed:
        console.print(f"\n{one.topic}")
    for finding in one.findings:
        console.print(_row(Text(finding.mark, STYLES[finding.mark]), finding.name, finding.said))
        if finding.mark != "ok":
            console.print(_row(Text(), "", f"-> {finding.remedy}"))


def _row(mark: Text, name: str, said: str) -> Table:
    """A table of its own: rows of all topics have the same columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=max(map(len, STYLES)), no_wrap=True)
    table.add_column(width=NAME_WIDTH, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(mark, name, Text(redact(said)))
    return table


def _verdict(done: list[Examined], seconds: float, failing: list[str]) -> str:
    marks = [finding.mark for one in done for finding in one.findings]
    others = [f"{marks.count(mark)} {word}" for mark, word in (("slow", "slow"), ("partly", "for some recipes alone")) if mark in marks]
    also = f" ({', '.join(others)})" if others else ""
    verdict = f"training would fail here: {', '.join(failing)}" if failing else f"training works here{also}"
    if seconds <= EXPECTED_SECONDS:
        return f"{verdict}; it took {seconds:.0f} s"
    longest = max(done, key=lambda one: one.seconds)
    named = ", ".join(finding.name for finding in longest.findings) or longest.topic
    return (
        f"{verdict}; it took {seconds:.0f} s, where {EXPECTED_SECONDS:.0f} are usual: the longest was {longest.topic} ({named}) with "
        f"{longest.seconds:.0f} s. A busy machine or a slow disk makes training's start as slow"
    )


def _content(done: list[Examined], seconds: float, *, works: bool) -> object:
    """The keys are in README.md, and stay."""
    findings = [
        {
            "topic": one.topic,
            "name": finding.name,
            "mark": finding.mark,
            "said": finding.said,
            "remedy": finding.remedy,
            "facts": finding.facts,
        }
        for one in done
        for finding in one.findings
    ]
    times = [{"topic": one.topic, "names": [finding.name for finding in one.findings], "seconds": round(one.seconds, 3)} for one in done]
    return redacted({"megakd": __version__, "works": works, "seconds": round(seconds, 3), "findings": findings, "probes": times})
