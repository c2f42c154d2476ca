"""Two programs' rates, alternated over rounds: medians, ratio, a table for people and one line of JSON for machines."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from megakd.runtime import environment, run_folder
from megakd.runtime.console import plain

OURS, THEIRS = "megakd", "open_clip"


@dataclass(frozen=True)
class Round:
    """Rates of one round, both sides right after each other: images or samples a second, one number a timed step or window."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """ours / theirs, of this round's medians."""
        return median(self.ours) / median(self.theirs)


@dataclass(frozen=True)
class Comparison:
    """All rounds. `ratio` is that of the medians; `paired` the median of the rounds' own ratios, which a drifting machine moves less."""

    rounds: list[Round]
    names: tuple[str, str] = (OURS, THEIRS)

    @property
    def ours(self) -> float:
        return median([median(each.ours) for each in self.rounds])

    @property
    def theirs(self) -> float:
        return median([median(each.theirs) for each in self.rounds])

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def paired(self) -> float:
        return median([each.ratio for each in self.rounds])

    @property
    def best(self) -> float:
        """Ratio of the fastest steps: what is left where other programs take the processor now and then."""
        return max(rate for each in self.rounds for rate in each.ours) / max(rate for each in self.rounds for rate in each.theirs)


def alternate(
    rounds: int, ours: Callable[[int], list[float]], theirs: Callable[[int], list[float]], names: tuple[str, str] = (OURS, THEIRS)
) -> Comparison:
    """Measure both `rounds` times, each called with the round's number; who goes first changes from round to round."""
    results = []
    for number in range(rounds):
        first, second = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        rates = {side: side(number) for side in (first, second)}
        results.append(Round(rates[ours], rates[theirs]))
        shown = ", ".join(f"{name} {median(rates[side]):.2f}/s" for name, side in zip(names, (ours, theirs), strict=True))
        print(f"round {number + 1}/{rounds}: {shown}, ratio {results[-1].ratio:.3f}", flush=True)
    return Comparison(results, names)


def table(title: str, comparison: Comparison, digits: int = 2) -> Table:
    """A row a round and a row of medians."""
    made = Table("round", *comparison.names, " / ".join(comparison.names), title=title, title_justify="left")
    for number, each in enumerate(comparison.rounds, 1):
        made.add_row(str(number), f"{median(each.ours):.{digits}f}", f"{median(each.theirs):.{digits}f}", f"{each.ratio:.3f}")
    made.add_section()
    made.add_row("median", f"{comparison.ours:.{digits}f}", f"{comparison.theirs:.{digits}f}", f"{comparison.ratio:.3f}")
    return made


def conditions(versions: Mapping[str, str | None], threads: int) -> dict[str, Any]:
    """Where and with what a number was measured."""
    return {
        "versions": {**environment.versions(("megakd", "deepspeed")), **versions},
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_average": round(os.getloadavg()[1], 2),
        "command": shlex.join(["megakd", *sys.argv[1:]]),
        "commit": environment.commit(),
    }


def report(
    name: str,
    unit: str,
    comparison: Comparison,
    settings: dict[str, Any],
    where: dict[str, Any],
    notes: list[str],
    more: dict[str, Any],
    file: Path | None,
) -> None:
    """Print the table, the notes, the conditions and one line of JSON, and write the latter to `file`."""
    console = plain()
    console.print(table(f"{name}, {unit}", comparison))
    ratios = f"{comparison.ratio:.3f} | median of the rounds' ratios {comparison.paired:.3f} | of the fastest {comparison.best:.3f}"
    console.print(f"ratio of the medians {ratios}")
    for note in notes:
        console.print(f"- {note}", markup=False)
    say_where(where)
    row = {
        "benchmark": name, "unit": unit, "ours": comparison.ours, "theirs": comparison.theirs, "ratio": comparison.ratio,
        "ratio_paired": comparison.paired, "ratio_fastest": comparison.best, **more, "settings": settings, **where,
        "sides": comparison.names, "rounds": [{"ours": each.ours, "theirs": each.theirs} for each in comparison.rounds],
    }  # fmt: skip
    record(row, file)


def say_where(where: dict[str, Any]) -> None:
    """What `conditions` found, for people."""
    console = plain()
    machine = f"{where['processor']}, {where['cores']} cores, load {where['load_average']}"
    console.print(f"{machine}, {where['threads']} thread(s) a process | commit {where['commit']}", markup=False)
    console.print(" ".join(f"{package} {version}" for package, version in where["versions"].items()), markup=False)
    console.print(where["command"], markup=False)


def record(row: dict[str, Any], file: Path | None) -> None:
    """A benchmark's numbers as one line of JSON, and in `file`."""
    print(json.dumps(row), flush=True)
    if file is not None:
        run_folder.write_json(file, row)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
