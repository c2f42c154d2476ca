"""The figure of `bench growth`: a panel for each axis, both sides logarithmic, its runs, the fitted line and its exponent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megakd.benchmarks import growth_fit
from megakd.runtime.extras import library

FIGURE = "growth"
_NEEDING = "megakd bench growth's figure needs"
_INK, _LINE, _LOSS = "#1b2127", "#0b6cb0", "#c9510c"


class Measured(Protocol):
    """What a panel shows of a run: seconds of a step, and of the loss in it."""

    @property
    def axis(self) -> str: ...
    @property
    def value(self) -> int: ...
    @property
    def processor(self) -> float: ...
    @property
    def loss(self) -> float: ...


def draw(axes: Mapping[str, tuple[growth_fit.Kind, str]], points: Sequence[Measured], folder: Path) -> list[Path]:
    """growth.svg and growth.png in `folder`. axes: by name what is expected, and what is held meanwhile."""
    figure = library("matplotlib.figure", _NEEDING, "study", "matplotlib").Figure(figsize=(3.1 * len(axes), 3.0), layout="constrained")
    panels = figure.subplots(1, len(axes), squeeze=False)[0]
    for panel, (name, (expected, holds)) in zip(panels, axes.items(), strict=True):
        _panel(panel, name, expected, holds, [point for point in points if point.axis == name])
    figure.suptitle("processor time of a step, tiny towers", fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{FIGURE}.{kind}" for kind in ("svg", "png")]
    with library("matplotlib", _NEEDING, "study").rc_context({"svg.hashsalt": FIGURE, "svg.fonttype": "none"}):
        for path in paths:  # without a date: the same points are the same file
            figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _panel(panel: Any, name: str, expected: growth_fit.Kind, holds: str, points: Sequence[Measured]) -> None:
    is_batch = name == "batch"
    values, seconds = [point.value for point in points], [point.processor - is_batch * point.loss for point in points]
    fit = growth_fit.power(values, seconds)
    panel.loglog(values, [1000 * one for one in seconds], "o", color=_INK, markersize=3.5, label="all else" if is_batch else "step")
    ends = [min(values), max(values)]
    panel.loglog(ends, [1000 * fit.at(end) for end in ends], "-", color=_LINE, linewidth=1.2, label=f"N ^ {fit.exponent:.3f}")
    if is_batch:
        panel.loglog(values, [1000 * point.loss for point in points], "s", color=_LOSS, markersize=3, label="loss")
    panel.set_title(f"{name} ({holds}): {expected}\nexponent {fit}", fontsize=7)
    panel.set_xlabel(name, fontsize=7)
    panel.set_ylabel("ms", fontsize=7)
    # a decade at least, or a flat line would fill the panel with noise
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, high / 30), max(high, 3 * max(seconds) * 1000))
    if max(values) < 10 * min(values):  # too few powers of ten to name
        panel.set_xticks(sorted(set(values)), map(str, sorted(set(values))))
        panel.set_xticks([], minor=True)
    panel.tick_params(labelsize=6)
    panel.legend(fontsize=6, loc="upper left")
