"""The tables at the end of a report, and results.csv: cost, hypotheses, what failed, every cell, and how each number is made again."""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.pages.records import Record
from megakd.pages.tables import Cell, Column, Table, count, name, shown, signed
from megakd.study.report.summary import Summary
from megakd.study.report.tables import AXIS_TITLES, estimate
from megakd.study.report.verdicts import Verdict, judged
from megakd.study.results import AXES, DONE, Results
from megakd.study.statistics import Equivalence

Records = Mapping[str, list[Record]]  # by the id of a row
FACTS = ("id", "kind", *AXES, "status", "message", "folder", "readout", "parameters", "images_per_second", "sets")
VERDICTS = {True: "holds", False: "does not hold"}


def cost(summary: Summary, records: Records) -> Table | None:
    """Hours and speed by method, and of teachers and controls, where their runs say so."""
    rows = []
    of_students = [(method, student) for method in summary.methods for student in dict.fromkeys(row.student for row in summary.cells)]
    groups = [
        (method, student or "–", [row for row in summary.cells if (row.method, row.student) == (method, student)])
        for method, student in of_students
    ]
    groups += [(title, "–", of) for title, of in summary.references().items()]
    for title, student, of in groups:
        runs = [found for row in of if row.status == DONE and (found := records.get(row.id))]
        trained = [hours for found in runs if (hours := found[0].hours) is not None]
        read = [hours for found in runs for record in found[1:] if (hours := record.hours) is not None]
        speed = [found[0].images_per_second for found in runs if found[0].images_per_second is not None]
        about = [row.about for row in of if row.status == DONE]
        parameters = [facts["parameters"] for facts in about if "parameters" in facts]
        inference = [facts["images_per_second"] for facts in about if "images_per_second" in facts]
        if trained or parameters or inference:
            times = [_hours(statistics.median(values)) if values else Cell("–") for values in (trained, read)]
            medians = [count(statistics.median(values)) if values else Cell("–") for values in (speed, parameters, inference)]
            rows.append((name(title), name(student), count(len(runs)), *times, *medians))
    if not rows:
        return None
    titles = ("runs", "training", "its readout", "training images/s", "parameters", "inference images/s")
    columns = (Column("row", numeric=False), Column("student", numeric=False), *map(Column, titles))
    caption = "Medians over runs. Times are those of the steps, without evaluations, on a machine that other runs may have shared."
    return Table("cost", "Cost", caption, columns, tuple(rows))


def hypotheses(summary: Summary) -> Table | None:
    """What was predicted before the cells ran, and what came out; a verdict of the study's own is taken as it is."""
    if not summary.results.hypotheses:
        return None
    rows = []
    for entry in summary.results.hypotheses:
        threshold = entry.get("threshold")
        rows.append(
            (
                name(_said(entry.get("name"))),
                name(_said(entry.get("prediction"))),
                name(_measure(entry)),
                Cell(_said(threshold), float(threshold) if isinstance(threshold, int | float) else None),
                _given(entry["verdict"]) if entry.get("verdict") is not None else _found(judged(summary, entry)),
            )
        )
    titles = (("hypothesis", False), ("prediction", False), ("measure", False), ("threshold", True), ("verdict", False))
    columns = tuple(Column(title, numeric=numeric) for title, numeric in titles)
    caption = "Prediction, measure and threshold were written down before the cells ran; the whole interval has to be beyond the threshold."
    return Table("hypotheses", "Hypotheses", caption, columns, tuple(rows))


def troubles(results: Results) -> Table | None:
    """Everything that did not end, or has something to say."""
    rows = [
        (name(row.id), name(row.kind), name(row.status), Cell(row.message or "–", row.message or None))
        for row in sorted(results.rows, key=lambda row: row.status == DONE)
        if row.status != DONE or row.message
    ]
    columns = tuple(Column(title, numeric=False) for title in ("row", "kind", "status", "last words"))
    caption = "Their scores are in no table above; of a row that is done, what there is to know of it."
    return Table("troubles", "Failed and missing", caption, columns, tuple(rows), folded=len(rows) > 20) if rows else None


def every_row(summary: Summary) -> Table:
    """One row each, as in results.csv."""
    results = summary.results
    rows = []
    for row in results.rows:
        axes = [getattr(row, axis) for axis in AXES]
        scores = [
            Cell(shown(row.scores[score.path], score.path), row.scores[score.path]) if score.path in row.scores else Cell("–")
            for score in results.scores
        ]
        rows.append((name(row.id), *(Cell("–" if value is None else str(value), value) for value in axes), name(row.status), *scores))
    texts = ("row", *(AXIS_TITLES[axis] for axis in AXES), "status")
    columns = (*(Column(text, numeric=text == "seed") for text in texts), *(Column(score.title) for score in results.scores))
    caption = "The same rows, with all digits and every other score, are in results.csv."
    return Table("rows", "Every run", caption, columns, tuple(rows), folded=True)


def reproduction(results: Results, records: Records) -> Table | None:
    """How each number is made again."""
    rows = []
    for row in results.rows:
        for place, record in enumerate(records.get(row.id, [])):
            if record.command:
                folder = row.folder if not place else row.readout or row.folder
                versions = ", ".join(f"{key} {value}" for key, value in record.versions.items())
                cells = (relative(folder, results.base), record.command, record.commit, versions, record.device)
                sets = row.about.get("sets", "–") if not place or folder == row.folder else "–"
                rows.append((*(Cell(text or "–", text) for text in cells), Cell(str(sets))))
    texts = ("folder", "command", "commit", "versions", "device", "evaluation sets")
    columns = tuple(Column(text, numeric=False) for text in texts)
    caption = "Of every run with a record of its start; its recipe, with the seed, is RUN/run.json, which --recipe takes."
    return Table("reproduction", "Commands of the runs", caption, columns, tuple(rows), folded=True) if rows else None


def as_csv(results: Results) -> str:
    """Every row with every score, unrounded; an empty field where there is none."""
    paths = list(dict.fromkeys([*(score.path for score in results.scores), *(path for row in results.rows for path in row.scores)]))
    paths = [path for path in paths if any(path in row.scores for row in results.rows)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*FACTS, *paths))
    for row in results.rows:
        facts: dict[str, Any] = {**vars(row), **row.about, "folder": relative(row.folder, results.base)}
        facts["readout"] = relative(row.readout, results.base) if row.readout is not None else None
        values = [facts.get(key) for key in FACTS] + [row.scores.get(path) for path in paths]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def relative(folder: Path, base: Path) -> str:
    """For people: from the study's folder; as it is where that is on another drive."""
    try:
        return os.path.relpath(folder, base)
    except ValueError:
        return str(folder)


def _hours(hours: float) -> Cell:
    minutes = 60 * hours
    text = f"{hours:,.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{60 * minutes:.0f} s"
    return Cell(text, hours)


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(inner)}" for key, inner in value.items())
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _measure(entry: Mapping[str, Any]) -> str:
    """With the methods that it is of."""
    measure, method, against = (_said(entry.get(key)) for key in ("measure", "method", "against"))
    of = f"{method} against {against}" if method and against else method
    return f"{measure.replace('_', ' ')}: {of}" if of else measure


def _found(verdict: Verdict | None) -> Cell:
    if verdict is None:
        return Cell("open")
    if verdict.found is None or verdict.found.value is None:
        return name(verdict.said if verdict.found is None else f"undecided: {verdict.said}")
    low, high = verdict.found.low, verdict.found.high
    number = estimate(verdict.found).text
    if verdict.points:
        number = f"{signed(verdict.found.value)} points"
        level = "90% interval " if isinstance(verdict.found, Equivalence) else ""
        number += f" ({level}{signed(low)} to {signed(high)})" if low is not None and high is not None else ""
    return name(f"{_head(verdict.holds)}: {number}, {verdict.said}")


def _given(verdict: Any) -> Cell:
    """Whether it "holds" is true, false, or null for what cannot be decided; everything else that a verdict says follows."""
    if not isinstance(verdict, Mapping):
        return name(_said(verdict))
    more = [_said(value) if key == "text" else f"{key} {_said(value)}" for key, value in verdict.items() if key != "holds"]
    return name(": ".join((_head(verdict.get("holds")), *filter(None, [", ".join(more)]))))


def _head(holds: Any) -> str:
    return VERDICTS[holds] if isinstance(holds, bool) else "undecided"
