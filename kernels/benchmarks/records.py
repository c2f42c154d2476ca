"""The rows of results/<device>.csv: what stands in them, how they are appended, and which of them may be compared."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from re import sub

import torch

Row = dict[str, str]
Place = tuple[str, int, int, int]  # loss, pairs, student width, teacher width

_RUN = ("date", "commit", "device", "threads", "python", "torch", "triton", "dtype")
_CASE = ("loss", "pairs", "student_width", "teacher_width", "implementation", "pass")
_NUMBERS = ("status", "rounds", "median_ms", "p10_ms", "p90_ms", "peak_mb", "tflops", "matrix_tflops", "percent_of_matrix", "note")
FIELDS = (*_RUN, *_CASE, *_NUMBERS)
OK = "ok"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"CPU {model}"


def slug(name: str) -> str:
    return sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def run_fields(device: torch.device, dtype: torch.dtype) -> Row:
    """What all rows of one run share; `date` identifies the run."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "dtype": str(dtype).removeprefix("torch."),
    }


def append(path: Path, rows: Iterable[Row]) -> None:
    """Writes the header where the file is new. Raises ValueError where an existing file has other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        _check_header(path)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """Raises ValueError where there is no such file, or one with other columns."""
    if not path.exists():
        raise ValueError(f"{path}: no results yet; run `python kernels/benchmarks/run.py` on this device first")
    _check_header(path)
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _check_header(path: Path) -> None:
    with open(path, newline="", encoding="utf-8") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != FIELDS:
        raise ValueError(f"{path} was written with other columns ({', '.join(header)}): move it away, or give another --out")


def place(row: Row) -> Place:
    return row["loss"], int(row["pairs"]), int(row["student_width"]), int(row["teacher_width"])


def alike(rows: list[Row]) -> list[Row]:
    """The rows with the last one's device, dtype and threads."""
    return [row for row in rows if all(row[name] == rows[-1][name] for name in ("device", "dtype", "threads"))]


def together(rows: list[Row], passes: str, wanted: Iterable[str] = ()) -> dict[Place, dict[str, Row]]:
    """By place and implementation the measured rows of one pass, all of a place from the same run: the last that has what is wanted.

    Only rows of one run are compared: its implementations took turns on the machine as it was.
    """
    runs: dict[tuple[Place, str], dict[str, Row]] = defaultdict(dict)
    for row in alike(rows):
        if row["pass"] == passes and row["status"] == OK:
            runs[place(row), row["date"]][row["implementation"]] = row
    return {where: by_name for (where, _), by_name in runs.items() if set(wanted) <= set(by_name)}
