"""The tables of a page, made once: the page, its Markdown and the tests read the same cells.

Scores are fractions inside and percent in `text`. A cell's `value` is the number in full, by which the page sorts.
"""

from __future__ import annotations

from dataclasses import dataclass

UP, DOWN = "▲", "▼"
DIAGNOSTICS = "diagnostics/"  # paths of numbers that are no fractions begin so


@dataclass(frozen=True)
class Cell:
    """text: as read; spread: behind ±; value: what it is sorted by, None for nothing; mark: UP or DOWN for a significant difference."""

    text: str
    value: float | str | None = None
    spread: str = ""
    best: bool = False
    mark: str = ""
    note: str = ""

    @property
    def long(self) -> bool:
        return len(self.text) > 60


@dataclass(frozen=True)
class Column:
    title: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """key: its id in the page. folded: shown when asked for."""

    key: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False

    @property
    def marked(self) -> bool:
        """Whether numbers leave room for marks behind them."""
        return any(cell.mark for row in self.rows for cell in row)


def name(text: str | None) -> Cell:
    return Cell(text or "–", text)


def count(value: float | None, text: str = "") -> Cell:
    return Cell(text or ("–" if value is None else f"{value:,.0f}"), value)


def shown(value: float, path: str = "") -> str:
    """A score as it is read: percent with one decimal, but for a diagnostic, which is no fraction."""
    return f"{value:.3f}" if path.startswith(DIAGNOSTICS) else f"{100 * value:.1f}"


def signed(value: float) -> str:
    """A difference of two scores, in points; a true minus sign."""
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "−")
