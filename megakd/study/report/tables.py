"""The tables of a study's report, of which its page, its Markdown and the console show the same cells."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from megakd.pages.tables import DIAGNOSTICS, DOWN, UP, Cell, Column, Table, count, name, shown, signed
from megakd.study.report.summary import Compared, Setting, Summary, labels, setting_of
from megakd.study.results import DONE, Row, Score
from megakd.study.statistics import Estimate

AXIS_TITLES = {"teacher": "teacher", "student": "student", "method": "method", "steps": "steps", "data": "data", "seed": "seed"}


def estimate(found: Estimate | None, digits: int = 2, factor: float = 1.0) -> Cell:
    """value (low to high), or a dash with the reason."""
    if found is None or found.value is None:
        return Cell("–", None, note=found.reason if found is not None else "")
    text = _rounded(factor * found.value, digits)
    if found.low is None or found.high is None:
        return Cell(text, found.value, note=found.reason)
    low, high = (_rounded(factor * end, digits) for end in (found.low, found.high))
    return Cell(f"{text} ({low} to {high})", found.value)


def methods(summary: Summary) -> Table:
    """The main table: a row for each method and setting."""
    several = len(summary.teachers) > 1
    over = " In each seed the mean over the teachers is taken first." if several else ""
    if left := list(dict.fromkeys(row.teacher for row in summary.cells if not summary.is_compared(row) and row.teacher)):
        over += f" Only over teachers that all methods have; {', '.join(left)}: by teacher below."
    tests = (
        f"{UP} and {DOWN} mark a difference from {summary.results.plain or 'no KD'} that is significant at 5% after Holm's "
        "correction over the whole table (paired t-test by seed)."
    )
    tests = tests if summary.tested else "Differences are not tested, which takes scipy."
    caption = f"Percent, mean ± standard deviation over seeds; the best of each column is bold.{over} {tests}"
    return _compared(summary, summary.by_method, "methods", "Methods compared", caption, with_teacher=False, folded=False)


def combinations(summary: Summary) -> Table | None:
    """A row for each method, teacher and setting, where there are several teachers."""
    if len(summary.teachers) < 2:
        return None
    caption = f"As above, for each teacher alone; {UP} and {DOWN} after Holm's correction over this table."
    return _compared(summary, summary.by_teacher, "combinations", "Methods by teacher", caption, with_teacher=True, folded=True)


def families(summary: Summary) -> Table | None:
    """The main score's parts by method, and of teachers and controls."""
    main = summary.results.main
    if main is None or main.families is None:
        return None
    pattern = re.compile(re.escape(main.families).replace(r"\*", "([^/]+)"))
    found = {path: match[1] for row in summary.results.rows for path in row.scores if (match := pattern.fullmatch(path))}
    if not found:
        return None
    varied = _varied(summary)
    rows = []
    groups = [compared.group for compared in summary.by_method]
    means = [[_mean_over(summary, group.method, group.setting, path) for path in found] for group in groups]
    best = [max((of[place] for of in means if of[place] is not None), default=None) for place in range(len(found))]  # type: ignore[type-var]
    for group, of in zip(groups, means, strict=True):
        cells = [Cell("–") if value is None else Cell(shown(value), value, best=value == best[place]) for place, value in enumerate(of)]
        if any(value is not None for value in of):
            rows.append((name(group.method), *_setting_cells(group.setting, varied), *cells))
    for title, of_reference in summary.references().items():
        values = [_own(of_reference, path) for path in found]
        if any(values):
            cells = [Cell(shown(math.fsum(own) / len(own)), math.fsum(own) / len(own)) if own else Cell("–") for own in values]
            rows.append((name(title), *(Cell("–") for _ in varied), *cells))
    columns = (
        Column("method", numeric=False),
        *(Column(AXIS_TITLES[axis], numeric=False) for axis in varied),
        *map(Column, found.values()),
    )
    caption = "Percent, mean over finished cells; the best method of each column is bold. Below them teachers and controls."
    return Table("families", f"{main.title} by kind of question", caption, columns, tuple(rows))


def references(summary: Summary) -> Table | None:
    """Teachers and controls, with their own scores."""
    found = summary.references()
    scores = [score for score in summary.results.scores if any(score.path in row.scores for rows in found.values() for row in rows)]
    if not found or not scores:
        return None
    rows = []
    for title, of in found.items():
        cells = []
        for score in scores:
            values = _own(of, score.path)
            mean = math.fsum(values) / len(values) if values else None
            spread = _deviation(values, score.path)
            cells.append(Cell("–") if mean is None else Cell(shown(mean, score.path), mean, spread))
        parameters = next((row.about["parameters"] for row in of if "parameters" in row.about), None)
        rows.append((name(title), count(len(of)), count(parameters), *cells))
    columns = (Column("row", numeric=False), Column("runs"), Column("parameters"), *(Column(score.title) for score in scores))
    caption = "What students are held against: the teachers' own scores, and controls. Percent, mean ± standard deviation over seeds."
    return Table("references", "Teachers and controls", caption, columns, tuple(rows))


def following(summary: Summary) -> Table | None:
    """How students follow their teachers, by method and task."""
    if not summary.followed:
        return None
    varied = _varied(summary)
    rows = []
    for found in summary.followed:
        order = found.order
        rows.append(
            (
                name(found.method),
                *_setting_cells(found.setting, varied),
                name(found.score.title),
                count(order.spearman.n, f"{order.spearman.n} ({order.students})"),
                estimate(order.spearman),
                estimate(order.kendall),
                estimate(order.wrong_pairs, 0, 100),
                estimate(order.slope),
                estimate(found.over_plain),
            )
        )
    numbers = (
        "teachers (students)",
        "Spearman",
        "Kendall",
        "pairs in the wrong order, %",
        "slope",
        f"Spearman over {summary.plain_kd}",
    )
    texts = ("method", *(AXIS_TITLES[axis] for axis in varied), "score")
    caption = (
        "The teacher's own score against its students' mean, each teacher once; where all methods have three teachers or more in common, "
        "only those. Intervals of 95% are a bootstrap over seeds: what other "
        "seeds would have given with these teachers. Of pairs in the wrong order, half is chance. Slope: points of the student for one "
        "point of the teacher."
    )
    columns = (*(Column(text, numeric=False) for text in texts), *map(Column, numbers))
    return Table("following", "Does the student follow its teacher?", caption, columns, tuple(rows))


def predictions(summary: Summary) -> Table | None:
    """Which diagnostic tells how well a student will do."""
    main = summary.results.main
    if not summary.predictions or main is None:
        return None
    rows = [
        (
            name(found.name.removeprefix(DIAGNOSTICS)),
            _number(found.r2, 2, found.reason),
            _number(found.rank_correlation, 2, found.reason),
            Cell("–", note=found.reason) if found.mean_abs_error is None else Cell(shown(found.mean_abs_error), found.mean_abs_error),
            count(found.n),
            count(found.teachers),
        )
        for found in summary.predictions
    ]
    columns = (Column("diagnostic", numeric=False), *map(Column, ("R²", "rank correlation", "mean error, points", "cells", "teachers")))
    caption = (
        f"Each diagnostic alone predicts {main.title} of the cells of a teacher that it has not seen, by a line through all other cells. "
        "R² of 0 is the others' mean; what misleads is below it."
    )
    return Table("predictions", "Which diagnostic predicts the score", caption, columns, tuple(rows))


def _compared(
    summary: Summary, found: Sequence[Compared], key: str, title: str, caption: str, *, with_teacher: bool, folded: bool
) -> Table:
    scores, main, plain = summary.results.scores, summary.results.main, summary.results.plain
    varied = _varied(summary)
    gained = main is not None and any(main.path in compared.gains for compared in found)
    means = {score.path: [mean for compared in found if (mean := compared.group.mean(score.path)) is not None] for score in scores}
    rows = []
    for compared in found:
        group = compared.group
        cells = [_score_cell(compared, score, max(means[score.path], default=None)) for score in scores]
        if gained and main is not None:
            cells.insert(scores.index(main) + 1, _gain_cell(compared, main))
        partial = "" if group.complete else ", no seed whole"
        done = Cell(f"{group.done} of {group.cells}{partial}", group.done)
        teacher = [name(group.teacher)] if with_teacher else []
        rows.append((name(group.method), *teacher, *_setting_cells(group.setting, varied), done, *cells))
    texts = ["method", *(["teacher"] if with_teacher else []), *(AXIS_TITLES[axis] for axis in varied)]
    numbers = ["cells", *(score.title for score in scores)]
    if gained and main is not None:
        numbers.insert(scores.index(main) + 2, f"over {plain}, points")
    columns = (*(Column(text, numeric=False) for text in texts), *map(Column, numbers))
    return Table(key, title, caption, columns, tuple(rows), folded)


def _score_cell(compared: Compared, score: Score, best: float | None) -> Cell:
    mean, path = compared.group.mean(score.path), score.path
    if mean is None:
        return Cell("–")
    seeds = len(compared.group.by_seed[path])
    gain, mark, note = compared.gains.get(path), "", f"{seeds} seed{'s' * (seeds != 1)}"
    if gain is not None and gain.value is not None and compared.differs(path):
        mark = UP if gain.value > 0 else DOWN
        side = "above" if gain.value > 0 else "below"
        note = f"{side} the method without a teacher, p = {compared.adjusted[path]:.3f} after Holm's correction"
    deviation = compared.group.deviation(path)
    return Cell(shown(mean, path), mean, "" if deviation is None else shown(deviation, path), mean == best, mark, note)


def _gain_cell(compared: Compared, main: Score) -> Cell:
    gain = compared.gains.get(main.path)
    if gain is None or gain.value is None:
        return Cell("–", note=gain.reason if gain is not None else "")
    if gain.low is None or gain.high is None:
        return Cell(signed(gain.value), gain.value, note=gain.reason)
    return Cell(f"{signed(gain.value)} ({signed(gain.low)} to {signed(gain.high)})", gain.value)


def _mean_over(summary: Summary, method: str, setting: Setting, path: str) -> float | None:
    values = [
        row.scores[path]
        for row in summary.cells
        if row.status == DONE and row.method == method and setting_of(row) == setting and path in row.scores and summary.is_compared(row)
    ]
    return math.fsum(values) / len(values) if values else None


def _own(rows: Sequence[Row], path: str) -> list[float]:
    """The scores of a teacher's or a control's rows: those of the first kind that has any, as `Results.teacher_scores`."""
    own = [row for row in rows if path in row.scores]
    return [row.scores[path] for row in own if row.kind == own[0].kind]


def _deviation(values: Sequence[float], path: str) -> str:
    if len(values) < 2:
        return ""
    mean = math.fsum(values) / len(values)
    return shown(math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)), path)


def _varied(summary: Summary) -> list[str]:
    """Axes of a setting that have several values here."""
    return [axis for axis in Setting._fields if any(axis in labels(setting, summary.settings) for setting in summary.settings)]


def _setting_cells(setting: Setting, varied: Sequence[str]) -> list[Cell]:
    values = setting._asdict()
    return [Cell(values[axis] or "–", _as_number(values[axis])) for axis in varied]


def _as_number(text: str | None) -> float | str | None:
    """Steps sort as numbers, names as text."""
    return float(text) if text is not None and re.fullmatch(r"\d+", text) else text


def _number(value: float | None, digits: int, reason: str) -> Cell:
    return Cell("–", None, note=reason) if value is None else Cell(_rounded(value, digits), value)


def _rounded(value: float, digits: int) -> str:
    """With a true minus sign, and none before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
