"""The pictures beside results/<device>.csv: time and memory against N, one line an implementation. Only `draw` imports matplotlib."""

from __future__ import annotations

from collections.abc import Iterable
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING

from cases import IMPLEMENTATIONS, LOSSES
from records import OK, Row, alike, place, together

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (
    ("forward", "median_ms", "forward, ms"),
    ("backward", "median_ms", "backward, ms"),
    ("both", "median_ms", "forward + backward, ms"),
    ("both", "peak_mb", "peak memory, MB"),
)
# Okabe and Ito's colours, which the colour-blind tell apart; ours drawn last and thicker.
COLOURS = dict(
    zip(IMPLEMENTATIONS, ("#000000", "#D55E00", "#F0B000", "#0072B2", "#009E73", "#999999", "#8B5A2B", "#CC79A7", "#56B4E9"), strict=True)
)
MARKERS = dict(zip(IMPLEMENTATIONS, "odDsv^<>P", strict=True))


def draw(csv: Path, rows: list[Row]) -> list[Path]:
    """One PNG for each teacher width, `<csv's stem>-teacher<width>.png`. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    rows = alike(rows)
    paths = []
    for width in sorted({int(row["teacher_width"]) for row in rows if row["status"] == OK}):
        shown = [row for row in rows if int(row["teacher_width"]) == width]
        losses = [loss for loss in LOSSES if any(row["loss"] == loss and row["status"] == OK for row in shown)]
        figure = Figure(figsize=(4.2 * len(PANELS), 3.1 * len(losses) + 1.2), layout="constrained")
        axes = figure.subplots(len(losses), len(PANELS), squeeze=False)
        for line, loss in zip(axes, losses, strict=True):
            for axis, panel in zip(line, PANELS, strict=True):
                _panel(axis, [row for row in shown if row["loss"] == loss], panel)
            _, _, student, teacher = next(place(row) for row in shown if row["loss"] == loss)
            line[0].set_title(f"{LOSSES[loss].title}: widths {student}/{teacher}", loc="left", fontsize=10, fontweight="bold")
        figure.suptitle(_title(shown[-1]), fontsize=12)
        _legend(figure, axes.flat)
        paths.append(csv.with_name(f"{csv.stem}-teacher{width}.png"))
        figure.savefig(paths[-1], dpi=110)
    return paths


def _title(row: Row) -> str:
    threads = f", {row['threads']} thread{'s' * (row['threads'] != '1')}" if row["device"].startswith("CPU") else ""
    versions = f"torch {row['torch']}, triton {row['triton']}, {row['commit']}, {row['date'][:10]}"
    return f"{row['device']}{threads}, {row['dtype']}; medians, bars p10 to p90, x: out of memory\n{versions}"


def _panel(axis: Axes, rows: list[Row], panel: tuple[str, str, str]) -> None:
    passes, quantity, label = panel
    by_place = together(rows, passes)
    for name in reversed(IMPLEMENTATIONS):
        places = sorted(where for where, rows_by_name in by_place.items() if float(rows_by_name.get(name, {}).get(quantity) or 0))
        if not places:
            continue
        sizes, points = [where[1] for where in places], [by_place[where][name] for where in places]
        look = {"color": COLOURS[name], "marker": MARKERS[name], "linewidth": 2.2 if name == "auto" else 1.3, "markersize": 4.5}
        axis.plot(sizes, [float(row[quantity]) for row in points], "--" if name == "auto" else "-", label=name, **look)
        if quantity == "median_ms":
            bottoms, tops = ([float(row[edge]) for row in points] for edge in ("p10_ms", "p90_ms"))
            axis.vlines(sizes, bottoms, tops, color=COLOURS[name], linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    labelled = (1, 2, 5) if high < 30 * low else (1,)  # mantissas: where an axis spans little, powers of ten alone are too few
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if round(value / 10 ** floor(log10(value))) in labelled else "")
    axis.set_xlabel("N pairs")
    axis.set_ylabel(label)
    sizes = sorted({int(row["pairs"]) for row in rows})
    axis.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes])
    axis.grid(alpha=0.3)
    _mark_out_of_memory(axis, rows, passes)


def _mark_out_of_memory(axis: Axes, rows: list[Row], passes: str) -> None:
    """Crosses along the upper edge, one step a name, so that several at one N stay apart."""
    failed = [row for row in rows if row["pass"] == passes and row["status"].startswith("out of memory")]
    for step, name in enumerate(IMPLEMENTATIONS):
        sizes = sorted({int(row["pairs"]) for row in failed if row["implementation"] == name})
        if sizes:
            height = 0.97 - 0.05 * step
            axis.plot(sizes, [height] * len(sizes), "x", color=COLOURS[name], markersize=6, transform=axis.get_xaxis_transform())


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = [name for name in IMPLEMENTATIONS if name in lines]
    if names:
        figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=len(names), frameon=False)
