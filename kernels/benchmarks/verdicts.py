"""What the recorded numbers say: whether the targets are reached, and which implementation is the fastest at which N.

All targets are of both passes with backend "auto". An H200's are those of KD and InfoNCE in one pass; a CPU's are of every loss.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from records import Place, Row, together

LOSS, OURS = "similarity", "auto"
# Backends that `auto` may choose from.
CHOICES = ("eager", "compiled", "chunked", "triton")

FASTER_THAN_EAGER, FROM_PAIRS = 2.0, 8192
FASTER_THAN_COMPILED = 1.0
LESS_MEMORY, LESS_MEMORY_PAIRS = 25.0, 32768
LARGEST_PAIRS, LARGEST_MB, LARGEST_MS = 131072, 3000.0, 500.0
OF_MATRIX_RATE, MATRIX_PAIRS = 55.0, 32768
# On a CPU, of the fastest backend that was measured beside it; the sizes that always get a line.
OF_FASTEST, CPU_PAIRS = 0.9, (256, 512, 1024, 2048, 4096, 8192)


class Verdict(NamedTuple):
    """A target, whether it is reached (None: not measured), and the numbers by which."""

    target: str
    holds: bool | None
    numbers: list[str]

    def __str__(self) -> str:
        word = {True: "reached", False: "MISSED", None: "not measured"}[self.holds]
        return f"{word:12}  {self.target}" + (f": {'; '.join(self.numbers)}" if self.numbers else "")


class _Number(NamedTuple):
    """What was reached somewhere, and whether that is enough."""

    where: Place
    value: float
    unit: str
    enough: bool

    def __str__(self) -> str:
        loss, pairs, student, teacher = self.where
        return f"{loss} N {pairs} ({student}/{teacher}) {self.value:.4g}{self.unit}" + ("" if self.enough else " (!)")


def _verdict(target: str, numbers: list[_Number]) -> Verdict:
    return Verdict(target, all(number.enough for number in numbers) if numbers else None, [str(number) for number in sorted(numbers)])


def verdicts(rows: list[Row], device: str | None = None) -> list[Verdict]:
    """Every target of an H200 ("cuda") and of a CPU ("cpu"), or of one of them, by the rows of such a device.

    Each of the last run that measured what it compares.
    """
    of_h200 = [] if device == "cpu" else _of_h200([row for row in rows if "H200" in row["device"]])
    of_cpu = [] if device == "cuda" else _of_cpu([row for row in rows if row["device"].startswith("CPU")])
    return [*(verdict._replace(target=f"H200: {verdict.target}") for verdict in of_h200), *of_cpu]


def _of_cpu(rows: list[Row]) -> list[Verdict]:
    """The rows of one dtype and number of threads: those of the last row."""
    shares: dict[int, list[_Number]] = {pairs: [] for pairs in CPU_PAIRS}
    for where, by_name in together(rows, "both", (OURS, "compiled")).items():
        times = {name: float(by_name[name]["median_ms"]) for name in (OURS, *CHOICES) if name in by_name}
        fastest = min(times, key=times.__getitem__)
        share = times[fastest] / times[OURS]
        shares.setdefault(where[1], []).append(_Number(where, share, f" of {fastest}", share >= OF_FASTEST))
    target = "CPU: auto at least at {share} of the fastest backend at N {pairs}"
    return [_verdict(target.format(share=OF_FASTEST, pairs=pairs), numbers) for pairs, numbers in sorted(shares.items())]


def _of_h200(rows: list[Row]) -> list[Verdict]:
    ours = {where: by_name[OURS] for where, by_name in _places(rows, OURS).items()}
    large = {where: row for where, row in ours.items() if where[1] >= MATRIX_PAIRS}
    shares = [
        _Number(where, share, " %", share >= OF_MATRIX_RATE) for where, row in large.items() for share in _float(row, "percent_of_matrix")
    ]
    largest = {where: row for where, row in ours.items() if where[1] == LARGEST_PAIRS}
    memory = []
    for where, by_name in _places(rows, OURS, "eager").items():
        peaks = [*_float(by_name["eager"], "peak_mb"), *_float(by_name[OURS], "peak_mb")]
        if where[1] == LESS_MEMORY_PAIRS and len(peaks) == 2:
            ratio = peaks[0] / max(peaks[1], 1e-3)
            memory.append(_Number(where, ratio, " x less", ratio >= LESS_MEMORY))
    return [
        _verdict(f"at least {FASTER_THAN_EAGER} x eager from N {FROM_PAIRS} on", _speed(rows, "eager", FASTER_THAN_EAGER, FROM_PAIRS)),
        _verdict("at least as fast as compiled at every N, within its spread", _speed(rows, "compiled", FASTER_THAN_COMPILED, 0)),
        _verdict(f"at most 1/{LESS_MEMORY:.0f} of eager's memory at N {LESS_MEMORY_PAIRS}", memory),
        _verdict(f"N {LARGEST_PAIRS} in less than {LARGEST_MB / 1e3:.0f} GB", _below(largest, "peak_mb", LARGEST_MB, " MB")),
        _verdict(f"N {LARGEST_PAIRS} in less than {LARGEST_MS:.0f} ms", _below(largest, "median_ms", LARGEST_MS, " ms")),
        _verdict(f"at least {OF_MATRIX_RATE:.0f} % of the matrix rate from N {MATRIX_PAIRS} on", shares),
    ]


def _places(rows: list[Row], *implementations: str) -> dict[Place, dict[str, Row]]:
    return {where: by_name for where, by_name in together(rows, "both", implementations).items() if where[0] == LOSS}


def _speed(rows: list[Row], other: str, at_least: float, from_pairs: int) -> list[_Number]:
    """Where a parity is asked for, `auto` may have chosen the other itself: its median inside the other's p10 to p90 is as fast."""
    numbers = []
    for where, by_name in _places(rows, OURS, other).items():
        if where[1] >= from_pairs:
            ratio = float(by_name[other]["median_ms"]) / float(by_name[OURS]["median_ms"])
            is_level = at_least == 1 and float(by_name[OURS]["median_ms"]) <= float(by_name[other]["p90_ms"])
            numbers.append(_Number(where, ratio, " x", ratio >= at_least or is_level))
    return numbers


def _below(rows: dict[Place, Row], name: str, limit: float, unit: str) -> list[_Number]:
    return [_Number(where, value, unit, value < limit) for where, row in rows.items() for value in _float(row, name)]


def _float(row: Row, name: str) -> list[float]:
    """The number, or nothing where it was not measured."""
    return [float(row[name])] if row[name] else []


def dispatch(rows: list[Row]) -> list[str]:
    """JSON lines, one a loss and size: the backend with the least time for both passes, and everybody's ms."""
    lines = []
    for (loss, pairs, student, teacher), by_name in sorted(together(rows, "both").items()):
        times = {name: float(by_name[name]["median_ms"]) for name in CHOICES if name in by_name}
        if times:
            fastest = min(times, key=times.__getitem__)
            row = by_name[fastest]
            shape = {"loss": loss, "pairs": pairs, "widths": [student, teacher], "dtype": row["dtype"], "threads": int(row["threads"])}
            lines.append(json.dumps({**shape, "fastest": fastest, "ms": times}))
    return lines
