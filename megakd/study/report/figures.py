"""The figures of a report: what each one shows. `drawing.py` has how they look."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from megakd.pages.drawing import HEIGHT, INK, LINE, MUTED, WIDTH, Figure, colour, short, style
from megakd.pages.records import Record
from megakd.pages.tables import DIAGNOSTICS
from megakd.study.report.summary import Group, Setting, Summary, labels, setting_of
from megakd.study.results import DONE, Row, Score

MOST_SETTINGS = 6  # of which the page has figures; the tables have all
MOST_SCORES = 8
MOST_DIAGNOSTICS = 12
LONGEST_CURVE = 200  # points

Legend = tuple[tuple[str, int | None], ...]


def gains(summary: Summary) -> list[Figure]:
    """Each method's main score by seed, for each setting."""
    main, found = summary.results.main, []
    for number, setting in enumerate(_shown(summary)):
        groups = [compared.group for compared in summary.by_method if compared.group.setting == setting]
        groups = [group for group in groups if main is not None and group.mean(main.path) is not None]
        if main is not None and groups:
            title = _title(f"{main.title} by method", setting, summary)
            alt = "; ".join(f"{group.method} {100 * (group.mean(main.path) or 0):.1f}%" for group in groups)
            height = 0.75 + 0.27 * len(groups)
            found.append(Figure(f"methods_{number}", title, alt, _dots(groups, main, summary), height=height))
    return found


def curves(summary: Summary) -> list[Figure]:
    """Students against their teachers: a panel for each setting and score, a line for each method."""
    found = []
    for number, setting in enumerate(_shown(summary)):
        for place, score in enumerate(summary.results.scores[:MOST_SCORES]):
            of = [one for one in summary.followed if one.setting == setting and one.score == score]
            if of:
                methods = [one.method for one in of]
                plain = _plain(summary, setting, score)
                legend = _legend(summary, methods, plain is not None)
                alt = "; ".join(
                    f"{one.method}: Spearman {one.order.spearman.value:.2f}"
                    if one.order.spearman.value is not None
                    else f"{one.method}: no correlation"
                    for one in of
                )
                title = _title(score.title, setting, summary)
                found.append(
                    Figure(f"teachers_{number}_{place}", title, alt, _against_teachers(summary, setting, score, methods, plain), legend)
                )
    return found


def heat_maps(summary: Summary) -> list[Figure]:
    """The main score, teacher by method: over no KD where there is such a cell, else itself."""
    main, found = summary.results.main, []
    if main is None or len(summary.teachers) < 2:
        return []
    for number, setting in enumerate(_shown(summary)):
        by_teacher = {
            (one.group.method, one.group.teacher): one.group.mean(main.path) for one in summary.by_teacher if one.group.setting == setting
        }
        plain = by_teacher.get((summary.results.plain or "", None))
        methods = [method for method in summary.methods if any(by_teacher.get((method, name)) is not None for name in summary.teachers)]
        if methods:
            values = [[_points(by_teacher.get((method, name)), plain) for name in summary.teachers] for method in methods]
            over = f", points over {summary.results.plain}" if plain is not None else ", %"
            alt = "; ".join(
                f"{method}: "
                + ", ".join(f"{name} {_cell_text(value, plain is not None)}" for name, value in zip(summary.teachers, of, strict=True))
                for method, of in zip(methods, values, strict=True)
            )
            width = max(WIDTH, 2.2 + 0.62 * len(summary.teachers))
            title = _title(f"{main.title}{over}", setting, summary)
            draw = _heat(summary.teachers, methods, values, signed=plain is not None)
            found.append(Figure(f"heat_{number}", title, alt, draw, width=width, height=0.9 + 0.33 * len(methods)))
    return found


def learning(summary: Summary, records: Mapping[str, list[Record]]) -> list[Figure]:
    """Losses by step, and scores by step where runs are evaluated on the way; a line for each method, over teachers and seeds."""
    found = []
    for number, setting in enumerate(_shown(summary)):
        rows = [row for row in summary.cells if setting_of(row) == setting and records.get(row.id)]
        names = {records[row.id][0].loss_name for row in rows} - {""}
        wanted: list[tuple[str, str, str]] = [("loss", "loss of pairs (InfoNCE)" if names == {"contrastive"} else "loss", "")]
        wanted += [("score", score.title, score.path) for score in summary.results.scores[:MOST_SCORES]]
        for place, (kind, title, path) in enumerate(wanted):
            by_method: dict[str, list[Sequence[tuple[int, float]]]] = defaultdict(list)
            for row in rows:
                curve = _curve(records[row.id], path) if kind == "score" else records[row.id][0].loss
                if len(curve) > 1 and row.method is not None:
                    by_method[row.method].append(curve)
            if by_method:
                methods = [method for method in summary.methods if method in by_method]
                alt = f"{title} by step of training for {', '.join(methods)}"
                draw = _over_steps(summary, by_method, methods, percent=kind == "score")
                found.append(
                    Figure(f"learning_{number}_{place}", _title(title, setting, summary), alt, draw, _legend(summary, methods, False))
                )
    return found


def diagnostics(summary: Summary) -> list[Figure]:
    """The main score against each diagnostic of a pair, best predictor first, in the setting with most cells."""
    main, found = summary.results.main, []
    if main is None:
        return []
    rows = [row for row in summary.cells if row.status == DONE and setting_of(row) == summary.main_setting and main.path in row.scores]
    for place, one in enumerate(summary.predictions[:MOST_DIAGNOSTICS]):
        points = [row for row in rows if one.name in row.scores]
        methods = [method for method in summary.methods if any(row.method == method for row in points)]
        title = one.name.removeprefix(DIAGNOSTICS)
        alt = f"{main.title} of {len(points)} cells against {title}"
        alt += f"; leave-one-teacher-out R² {one.r2:.2f}" if one.r2 is not None else ""
        found.append(Figure(f"diagnostic_{place}", title, alt, _scatter(summary, points, one.name, main), _legend(summary, methods, False)))
    return found


def _dots(groups: Sequence[Group], main: Score, summary: Summary) -> Any:
    def draw(axes: Any) -> None:
        plain = next((group for group in groups if group.method == summary.results.plain), None)
        if plain is not None:
            axes.axvline(100 * (plain.mean(main.path) or 0), color=MUTED, linestyle="--", linewidth=1.1)
        for place, group in enumerate(groups):
            values = [100 * value for value in group.by_seed[main.path].values()]
            tint = MUTED if group is plain else colour(0)
            axes.plot(values, [place] * len(values), linestyle="", marker="o", markersize=4, color=tint, alpha=0.55, markeredgewidth=0)
            axes.plot([statistics.fmean(values)], [place], linestyle="", marker="|", markersize=12, markeredgewidth=2.2, color=tint)
        axes.set_yticks(range(len(groups)), [short(group.method) for group in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"{short(main.title)}, %")

    return draw


def _against_teachers(summary: Summary, setting: Setting, score: Score, methods: Sequence[str], plain: Sequence[float] | None) -> Any:
    own = summary.teacher_means(score.path)

    def draw(axes: Any) -> None:
        if plain:
            mean, spread = 100 * statistics.fmean(plain), 100 * _deviation(plain)
            axes.axhline(mean, color=MUTED, linestyle="--", linewidth=1.1)
            axes.axhspan(mean - spread, mean + spread, color=MUTED, alpha=0.1, linewidth=0)
        for method in methods:
            students = summary.students(setting, method, score.path)
            names = sorted((name for name in students if name in own), key=lambda name: own[name])
            x = [100 * own[name] for name in names]
            means = [100 * statistics.fmean(students[name].values()) for name in names]
            spreads = [100 * _deviation(list(students[name].values())) for name in names]
            look = style(summary.place(method))
            low, high = ([mean + sign * spread for mean, spread in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=look["color"], alpha=0.13, linewidth=0)
            axes.plot(x, means, **look)
        if own:
            axes.grid(visible=False, axis="x")
            _name_teachers(axes, own)
        axes.set_xlabel("the teacher's own, %")
        axes.set_ylabel("students', %")

    return draw


def _name_teachers(axes: Any, own: Mapping[str, float]) -> None:
    """Above the plot at their scores; the next row where two would touch."""
    from matplotlib.transforms import blended_transform_factory

    low, high = 100 * min(own.values()), 100 * max(own.values())
    margin = 0.08 * (high - low) or 1.0
    axes.set_xlim(low - margin, high + margin)
    width = high - low + 2 * margin
    place, ends = blended_transform_factory(axes.transData, axes.transAxes), [-math.inf] * 3
    for name, score in sorted(own.items(), key=lambda item: item[1]):
        label = name if len(name) <= 12 else f"{name[:11]}…"
        half = 0.5 * width * 0.021 * len(label)
        level = next((number for number, end in enumerate(ends) if 100 * score - half > end), len(ends) - 1)
        ends[level] = 100 * score + half
        axes.text(100 * score, 1.02 + 0.07 * level, label, transform=place, ha="center", va="bottom", fontsize=7.5, color=MUTED)
        axes.axvline(100 * score, color=LINE, linewidth=0.6, zorder=0)


def _heat(teachers: Sequence[str], methods: Sequence[str], values: Sequence[Sequence[float | None]], *, signed: bool) -> Any:
    def draw(axes: Any) -> None:
        known = [value for row in values for value in row if value is not None]
        low, high = min(known), max(known)
        reach = max(abs(low), abs(high)) or 1.0
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value is None:
                    axes.text(x, y, "–", ha="center", va="center", color=MUTED)
                    continue
                shade = value / reach if signed else (value - low) / ((high - low) or 1.0)
                fill = _between("#f3f3f0", "#2a7fbf" if shade >= 0 else "#cf6a1f", abs(shade) * 0.85)
                axes.add_patch(_rectangle(x, y, fill))
                axes.text(x, y, _cell_text(value, signed), ha="center", va="center", fontsize=8.5, color=_on(fill))
        axes.set_xlim(-0.5, len(teachers) - 0.5)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_xticks(range(len(teachers)), [name if len(name) <= 10 else f"{name[:9]}…" for name in teachers])
        axes.set_yticks(range(len(methods)), [short(name) for name in methods])
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelcolor=INK)
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)

    return draw


def _over_steps(
    summary: Summary, by_method: Mapping[str, Sequence[Sequence[tuple[int, float]]]], methods: Sequence[str], *, percent: bool
) -> Any:
    factor = 100 if percent else 1

    def draw(axes: Any) -> None:
        for method in methods:
            at_step: dict[int, list[float]] = defaultdict(list)
            for curve in by_method[method]:
                for step, value in curve:
                    at_step[step].append(factor * value)
            steps = sorted(at_step)
            steps = steps[:: max(1, len(steps) // LONGEST_CURVE)]
            look = style(summary.place(method)) | ({"marker": "", "linewidth": 1.2} if len(steps) > 12 else {"markersize": 3})
            axes.fill_between(
                steps,
                [min(at_step[step]) for step in steps],
                [max(at_step[step]) for step in steps],
                color=look["color"],
                alpha=0.1,
                linewidth=0,
            )
            axes.plot(steps, [statistics.fmean(at_step[step]) for step in steps], **look)
        axes.set_xlabel("step")
        axes.set_ylabel("%" if percent else "loss")

    return draw


def _scatter(summary: Summary, points: Sequence[Row], name: str, main: Score) -> Any:
    def draw(axes: Any) -> None:
        for method in summary.methods:
            of = [row for row in points if row.method == method]
            look = style(summary.place(method)) | {"linestyle": ""}
            axes.plot([row.scores[name] for row in of], [100 * row.scores[main.path] for row in of], alpha=0.8, **look)
        axes.set_xlabel(short(name.removeprefix(DIAGNOSTICS)))
        axes.set_ylabel(f"{short(main.title)}, %")

    return draw


def _shown(summary: Summary) -> list[Setting]:
    return summary.settings[:MOST_SETTINGS]


def _title(title: str, setting: Setting, summary: Summary) -> str:
    varied = ", ".join(f"{axis} {short(value)}" for axis, value in labels(setting, summary.settings).items())
    return f"{title} ({varied})" if varied else title


def _legend(summary: Summary, methods: Sequence[str], with_plain: bool) -> Legend:
    named: Legend = tuple((method, summary.place(method)) for method in methods)
    return (*named, (summary.results.plain or "no KD", None)) if with_plain else named


def _plain(summary: Summary, setting: Setting, score: Score) -> list[float] | None:
    rows = [row for row in summary.cells if row.method == summary.results.plain and setting_of(row) == setting]
    values = [row.scores[score.path] for row in rows if row.status == DONE and score.path in row.scores]
    return values or None


def _curve(records: Sequence[Record], path: str) -> Sequence[tuple[int, float]]:
    return next((record.evaluations[path] for record in records if path in record.evaluations), ())


def _points(value: float | None, plain: float | None) -> float | None:
    return None if value is None else 100 * (value - (plain or 0.0))


def _cell_text(value: float | None, signed: bool) -> str:
    return "–" if value is None else (f"{value:+.1f}" if signed else f"{value:.1f}").replace("-", "−")


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _rectangle(x: int, y: int, fill: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=fill, linewidth=0)


def _between(start: str, end: str, share: float) -> str:
    """A colour on the way from start to end."""
    mixed = (round(int(start[at : at + 2], 16) * (1 - share) + int(end[at : at + 2], 16) * share) for at in (1, 3, 5))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _on(fill: str) -> str:
    """Black or white, whichever is read on `fill`."""
    red, green, blue = (int(fill[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return "#101418" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.22 else "#ffffff"


__all__ = ["HEIGHT", "curves", "diagnostics", "gains", "heat_maps", "learning"]
