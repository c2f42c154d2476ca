"""The report of a study or of run folders: report.html, report.md, results.csv and figures/, from one reading of the results.

The page is one file: its stylesheet, its script and its figures are inside, and its Content-Security-Policy lets a browser load nothing
else. Names of a study come from people and recipes; Jinja escapes them, and nothing that they hold is taken as markup.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megakd.runtime.extras import library
from megakd.runtime.files import check_place, write_text
from megakd.study.report import appendix, drawing, figures, markdown, tables
from megakd.study.report.answer import Answer, answer, escaping
from megakd.study.report.drawing import Figure
from megakd.study.report.records import records_of
from megakd.study.report.summary import Summary
from megakd.study.report.tables import Table
from megakd.study.results import DONE, FAILED, MISSING, RUNNING, Results
from megakd.version import __version__

PAGE, MARKDOWN, CSV, FIGURES = "report.html", "report.md", "results.csv", "figures"
OURS = re.compile(r"(methods|teachers|heat|learning|diagnostic)_\d+(_\d+)?\.(svg|png)")  # in FIGURES
NAMES = {
    "teacher": ("teacher", "teachers"),
    "student": ("student", "students"),
    "method": ("method", "methods"),
    "steps": ("length of training", "lengths of training"),
    "data": ("training set", "training sets"),
    "seed": ("seed", "seeds"),
}
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Figures:
    """Figures beside each other, with one legend for all."""

    title: str
    caption: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Section:
    """facts: terms with what they are, set as code."""

    key: str
    title: str
    parts: tuple[Table | Figures, ...] = ()
    texts: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Report:
    title: str
    question: str
    answer: Answer
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    command: str
    results: Results = field(repr=False)

    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for part in section.parts if isinstance(part, Figures) for figure in part.figures]


def make(results: Results, out: Path, command: Sequence[str]) -> Report:
    """Write the report of `results` to the folder `out`. command: what is noted as the way to make it again.

    Raises ValueError where `out` cannot be written to or has other files in figures/, and where a library of the extra "study" is missing.
    """
    jinja2 = library("jinja2", "a report's page needs", "study")
    drawing.matplotlib()
    check_place(out, "--out")
    folder = out / FIGURES
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if others := sorted(name for name in there if not OURS.fullmatch(name)):
        raise ValueError(f"--out {out}: {folder} holds files that no report wrote ({', '.join(others[:3])}); choose another --out")
    report = compose(results, command)
    folder.mkdir(parents=True, exist_ok=True)
    written = {name for figure in report.figures() for name in drawing.write(figure, folder)}
    for name in set(there) - written:
        (folder / name).unlink()
    write_text(out / CSV, appendix.as_csv(results))
    write_text(out / MARKDOWN, as_markdown(report))
    write_text(out / PAGE, _as_html(report, jinja2))
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
        _section(
            "result",
            "Methods compared",
            tables.methods(summary),
            drawn["gains"],
            tables.combinations(summary),
            tables.families(summary),
            text=_what_to_know(summary),
        ),
        _section(
            "teachers",
            "Students against their teachers",
            drawn["curves"],
            tables.following(summary),
            drawn["heat"],
            tables.references(summary),
            text=followed,
        ),
        _section("learning", "Learning curves", drawn["learning"]),
        _section("diagnostics", f"Diagnostics against {main}", tables.predictions(summary), drawn["diagnostics"]),
        _section("cost", "Cost", appendix.cost(summary, records)),
        _section("hypotheses", "Hypotheses", appendix.hypotheses(summary)),
        _section("troubles", "Failed and missing", appendix.troubles(results)),
        _reproduction(summary, appendix.reproduction(results, records)),
    )
    return Report(
        title=results.title,
        question=results.question,
        answer=answer(summary),
        facts=_facts(summary),
        sections=tuple(section for section in sections if section is not None),
        command=shlex.join(command),
        results=results,
    )


def as_markdown(report: Report) -> str:
    """The page's text, tables and links to its figures."""
    text = markdown.escaped
    verdict, shown = report.answer.verdict, report.answer.shown
    parts = [f"# {text(report.title)}", text(report.question), f"**{text(verdict)}.** {text(' '.join(filter(None, shown)))}"]
    parts.append(", ".join(f"{number} {text(what)}" for number, what in report.facts))
    for section in report.sections:
        parts.append(f"## {text(section.title)}")
        parts += map(text, section.texts)
        parts.append("\n".join(f"- {text(term)}: {text(said)}" for term, said in section.facts))
        for part in section.parts:
            if isinstance(part, Table):
                parts.append(markdown.table(part, headed=part.title != section.title))
            else:
                parts.append(text(part.caption))
                parts += [f"![{text(figure.title)}]({FIGURES}/{figure.key}.svg)" for figure in part.figures]
    return "\n\n".join(filter(None, parts)) + "\n"


def _as_html(report: Report, jinja2: Any) -> str:
    import markupsafe

    trusted = markupsafe.Markup  # of our own files and of matplotlib's SVG, which escapes what it is given
    script, css = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    sections = []
    for section in report.sections:
        parts: list[Any] = []
        for part in section.parts:
            if isinstance(part, Table):
                parts.append(part)
                continue
            legend = dict(entry for figure in part.figures for entry in figure.legend)
            panels = [{**vars(figure), "svg": trusted(drawing.page_svg(figure))} for figure in part.figures]
            swatches = [(label, trusted(drawing.swatch(place))) for label, place in legend.items()]
            parts.append({"title": part.title, "caption": part.caption, "legend": swatches, "figures": panels})
        sections.append({**vars(section), "parts": parts})
    return str(
        environment.get_template("page.html.j2").render(
            page={**vars(report), "sections": sections},
            css=trusted(css),
            script=trusted(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=__version__,
            up=tables.UP,
        )
    )


def _section(key: str, title: str, *parts: Table | Figures | None, text: str = "") -> Section | None:
    """None where there is nothing to show in it."""
    there = tuple(part for part in parts if part is not None and (isinstance(part, Table) or part.figures))
    there = tuple(part for part in there if not isinstance(part, Table) or part.rows)
    return Section(key, title, there, texts=(text,) if text else ()) if there or text else None


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
