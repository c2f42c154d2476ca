"""The report of a study or of run folders: report.html, report.md, results.csv and figures/, from one reading of the results."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megakd.pages import page
from megakd.pages.page import Figures, Page, Section, section
from megakd.pages.tables import Table
from megakd.runtime.files import write_text
from megakd.study.report import appendix, figures, tables
from megakd.study.report.answer import Answer, answer, escaping
from megakd.study.report.records import records_of
from megakd.study.report.summary import Summary
from megakd.study.results import DONE, FAILED, MISSING, RUNNING, Results

CSV = "results.csv"
OURS = re.compile(r"(methods|teachers|heat|learning|diagnostic)_\d+(_\d+)?\.(svg|png)")  # in figures/
NAMES = {
    "teacher": ("teacher", "teachers"),
    "student": ("student", "students"),
    "method": ("method", "methods"),
    "steps": ("length of training", "lengths of training"),
    "data": ("training set", "training sets"),
    "seed": ("seed", "seeds"),
}


@dataclass(frozen=True, kw_only=True)
class Report(Page):
    """A study's page, with what its verdict and sentences are made of."""

    answer: Answer
    results: Results = field(repr=False)


def make(results: Results, out: Path, command: Sequence[str]) -> Report:
    """Write the report of `results` to the folder `out`. command: what is noted as the way to make it again.

    Raises ValueError where `out` cannot be written to or has other files in figures/, and where a library of the extra "study" is missing.
    """
    page.check_out(out, OURS)
    report = compose(results, command)
    page.write(report, out, kinds=("svg", "png"))
    write_text(out / CSV, appendix.as_csv(results))
    return report


def compose(results: Results, command: Sequence[str]) -> Report:
    """The report's contents, in order."""
    summary = Summary(results)
    records = {row.id: records_of(row) for row in results.rows}
    why_no_curves = "" if summary.followed else "No score has two teachers with students, so there is no order of teachers to follow."
    followed = why_no_curves or escaping(summary)
    drawn = {
        "curves": Figures(
            "",
            "Each teacher's own score against the mean of its students; the band is one standard deviation over seeds, the dashed line "
            f"{results.plain or 'no KD'}. A line that falls is a stronger teacher with weaker students.",
            tuple(figures.curves(summary)),
        ),
        "gains": Figures("", "A dot is a seed, the bar the mean; dashed: without a teacher.", tuple(figures.gains(summary))),
        "heat": Figures("Teacher by method", "", tuple(figures.heat_maps(summary))),
        "learning": Figures(
            "", "Mean over teachers and seeds, from the smallest to the largest run.", tuple(figures.learning(summary, records))
        ),
        "diagnostics": Figures("", "", tuple(figures.diagnostics(summary))),
    }
    main = results.main.title if results.main else "score"
    sections = (
        section(
            "result",
            "Methods compared",
            tables.methods(summary),
            drawn["gains"],
            tables.combinations(summary),
            tables.families(summary),
            texts=(_what_to_know(summary),),
        ),
        section(
            "teachers",
            "Students against their teachers",
            drawn["curves"],
            tables.following(summary),
            drawn["heat"],
            tables.references(summary),
            texts=(followed,),
        ),
        section("learning", "Learning curves", drawn["learning"]),
        section("diagnostics", f"Diagnostics against {main}", tables.predictions(summary), drawn["diagnostics"]),
        section("cost", "Cost", appendix.cost(summary, records)),
        section("hypotheses", "Hypotheses", appendix.hypotheses(summary)),
        section("troubles", "Failed and missing", appendix.troubles(results)),
        _reproduction(summary, appendix.reproduction(results, records)),
    )
    found = answer(summary)
    return Report(
        title=results.title,
        question=results.question,
        answer=found,
        verdict=found.verdict,
        sentences=tuple(filter(None, found.shown)),
        facts=_facts(summary),
        sections=tuple(one for one in sections if one is not None),
        command=shlex.join(command),
        results=results,
    )


def _what_to_know(summary: Summary) -> str:
    """Of how far the tables and figures can be compared, and what of a large study they leave out."""
    sets = {row.about["sets"] for row in summary.cells if row.status == DONE and "sets" in row.about}
    said = []
    if len(sets) > 1:
        said.append(
            f"The cells were scored on {len(sets)} different evaluation sets, of which only equal ones can be compared: see the commands."
        )
    if len(summary.settings) > figures.MOST_SETTINGS:
        said.append(
            f"Figures are of the first {figures.MOST_SETTINGS} of {len(summary.settings)} students, steps and data; tables have all."
        )
    if len(summary.results.scores) > figures.MOST_SCORES:
        said.append(f"Curves are of the first {figures.MOST_SCORES} of {len(summary.results.scores)} scores; tables have all.")
    return " ".join(said)


def _facts(summary: Summary) -> tuple[tuple[str, str], ...]:
    results = summary.results
    counts = {status: sum(row.status == status for row in summary.cells) for status in (DONE, RUNNING, FAILED, MISSING)}
    found = [(f"{counts[DONE]} of {len(summary.cells)}", "cells finished")]
    found += [(str(counts[status]), status) for status in (RUNNING, FAILED, MISSING) if counts[status]]
    for axis, (one, several) in NAMES.items():
        if number := len(results.axes[axis]):
            found.append((str(number), one if number == 1 else several))
    return tuple(found)


def _reproduction(summary: Summary, commands: Table | None) -> Section:
    results = summary.results
    facts = [("study", results.command), ("commit", results.commit or ""), ("megakd", results.version or "")]
    facts += [("seeds", ", ".join(results.axes["seed"]))]
    facts += [(f"data {name}", checksum) for name, checksum in results.data.items()]
    parts = tuple(part for part in (appendix.every_row(summary), commands) if part is not None and part.rows)
    return Section(
        "reproduction", "How to make each number again", parts, texts=results.notes, facts=tuple(fact for fact in facts if fact[1])
    )
