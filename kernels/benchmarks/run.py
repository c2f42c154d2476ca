"""Measures the losses of megakd_kernels against each other and against other people's: time, peak memory, share of the matrix rate.

python kernels/benchmarks/run.py                                  everything that this machine can
python kernels/benchmarks/run.py --sizes 1k 8k --losses similarity --budget 120
python kernels/benchmarks/run.py --check                          do the recorded numbers reach the targets?

Rows are appended to results/<device>.csv group by group, so an interrupted run keeps what it has. See kernels/README.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import plot
import torch
from cases import IMPLEMENTATIONS, LOSSES, PASSES, LossCase
from measure import Meter
from records import OK, Row, append, device_name, place, read, run_fields, slug
from rounds import Limits, Runner, rows
from verdicts import dispatch, verdicts

RESULTS = Path(__file__).parent / "results"
SIZES = tuple(1024 << step for step in range(8))
WIDTHS = ((512, 1024), (768, 1280))
# On a GPU the loss and the sizes that the targets speak of come first: a spent budget takes the others.
FIRST_ON_CUDA = (8192, 32768, 131072)
ROUNDS = {"cuda": 30, "cpu": 15}


def _pairs(text: str) -> int:
    count = int(text[:-1]) * 1024 if text.endswith("k") else int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"a size is a number of pairs such as 1024 or 1k, got {text}")
    return count


def _widths(text: str) -> tuple[int, int]:
    try:
        student, teacher = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"widths are student/teacher such as 512/1024, got {text}") from None
    return student, teacher


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS", help=f"of {', '.join(LOSSES)}")
    parser.add_argument("--sizes", nargs="+", type=_pairs, default=list(SIZES), metavar="N", help="pairs: 1024 or 1k; default 1k to 128k")
    parser.add_argument("--widths", nargs="+", type=_widths, default=list(WIDTHS), metavar="S/T", help="default 512/1024 768/1280")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS), metavar="NAME",
                        help=f"of {', '.join(IMPLEMENTATIONS)}")  # fmt: skip
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), metavar="PASS", help=f"of {', '.join(PASSES)}")
    parser.add_argument("--rounds", type=int, help="at most so many a group, every implementation once a round; at least 3 are tried")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; what does not fit becomes a row that says so")
    parser.add_argument("--memory", type=float, help="GB that may be used (default: 90 %% of what is available on the CPU, all of a GPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV and its plots")
    parser.add_argument("--copy-to", type=Path, help="a second folder that receives both at the end")
    parser.add_argument("--csv", type=Path, help="with --check, --dispatch, --plot: this file instead of this device's")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--check",
        action="store_true",
        help="measure nothing; of each target, an H200's and a CPU's (--device: one's), whether the rows reach it (exit code 1: one not)",
    )
    instead.add_argument("--dispatch", action="store_true", help="measure nothing; JSON lines with the fastest backend for each loss and N")
    instead.add_argument("--plot", action="store_true", help="measure nothing; draw the plots again")
    return parser.parse_args(argv)


def _device(name: str | None) -> torch.device:
    """Raises ValueError where the wanted device is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"no CUDA device: torch {torch.__version__} sees none; `nvidia-smi` shows what the driver sees")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _groups(args: argparse.Namespace, device: torch.device) -> list[list[LossCase]]:
    """The cases by loss and size, in the order of importance."""
    groups = []
    for number, (student, teacher) in enumerate(args.widths):
        for loss in args.losses:
            for pairs in args.sizes:
                widths = LOSSES[loss].student_width(student, teacher), teacher
                cases = [LossCase(loss, pairs, *widths, name) for name in IMPLEMENTATIONS if name in args.implementations]
                cases = [case for case in cases if case.exists]
                place_of_loss = list(LOSSES).index(loss)
                # On the CPU times are foreseen from smaller sizes, so those come first.
                on_cuda = (loss != "similarity", pairs not in FIRST_ON_CUDA, place_of_loss, pairs)
                order = (number, *(on_cuda if device.type == "cuda" else (pairs, place_of_loss)))
                groups.append((order, cases))
    return [cases for _, cases in sorted(groups) if cases]


def _memory(device: torch.device, gigabytes: float | None) -> float:
    if gigabytes is not None:
        return gigabytes * 1e9
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        import psutil

        available = psutil.virtual_memory().available
    except ImportError:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0.9 * available


def _measure(args: argparse.Namespace, device: torch.device, csv: Path) -> list[Row]:
    started = time.monotonic()
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    meter, run = Meter(device), run_fields(device, dtype)
    rate = meter.matrix_rate(dtype)
    versions = f"torch {run['torch']}, triton {run['triton']}"
    print(f"{run['device']}, {run['dtype']}, {versions}: matrix products {rate / 1e12:.4g} TFLOP/s", flush=True)
    limits = Limits(started + args.budget, _memory(device, args.memory), rate, tries_all=device.type == "cuda")
    runner = Runner(meter, dtype, limits, args.rounds or ROUNDS[device.type])
    written: list[Row] = []
    try:
        for cases in _groups(args, device):
            group = [row for result in runner.group(cases) for row in rows(result, args.passes, rate, run)]
            append(csv, group)
            written += group
            print(f"{time.monotonic() - started:6.0f} s  {cases[0].loss} N {cases[0].pairs}", file=sys.stderr, flush=True)
    finally:
        runner.close()
    return written


def table(rows: list[Row]) -> str:
    """The run for a reader: medians, how many times faster than eager, memory, share of the matrix rate."""
    cases: dict[tuple[object, ...], dict[str, Row]] = {}
    absent = [row for row in rows if row["status"].startswith("unavailable")]
    for row in rows:
        if row not in absent:
            cases.setdefault((*place(row), row["implementation"]), {})[row["pass"]] = row
    lines = [("loss", "N", "widths", "implementation", *(f"{one} ms" for one in PASSES), "x eager", "peak MB", "% of mm", "")]
    for (loss, pairs, student, teacher, name), passes in cases.items():
        whole = passes.get("both", next(iter(passes.values())))
        eager = cases.get((loss, pairs, student, teacher, "eager"), {}).get("both", {}).get("median_ms")
        ours = whole.get("median_ms") if whole["pass"] == "both" else None
        ratio = f"{float(eager) / float(ours):.2f}" if eager and ours else ""
        times = (passes.get(one, {}).get("median_ms", "") for one in PASSES)
        remark = "" if whole["status"] == OK else whole["status"]
        numbers = (ratio, whole.get("peak_mb", ""), whole.get("percent_of_matrix", ""))
        lines.append((str(loss), str(pairs), f"{student}/{teacher}", str(name), *times, *numbers, remark))
    columns = []
    for number, column in enumerate(zip(*lines, strict=True)):
        size, is_text = max(map(len, column)), number in (0, 2, 3, len(lines[0]) - 1)
        columns.append([cell.ljust(size) if is_text else cell.rjust(size) for cell in column])
    remarks = [f"{row['implementation']}: {row['note']}" for row in rows if row["note"] and row not in absent]
    remarks += [f"{row['implementation']}, {row['loss']}: {row['status']}" for row in absent]
    return "\n".join([*("  ".join(line).rstrip() for line in zip(*columns, strict=True)), "", *dict.fromkeys(remarks)])


def _draw(csv: Path) -> list[Path]:
    try:
        return plot.draw(csv, read(csv))
    except ImportError:
        print("no plot was drawn: matplotlib is not installed")
        return []


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 1 where --check found a target that is missed, 2 for a request that cannot be met."""
    args = _arguments(argv)
    try:
        csv = args.csv or args.out / f"{slug(device_name(_device(args.device)))}.csv"
        if args.check:
            recorded = [args.csv] if args.csv else sorted(args.out.glob("*.csv"))
            if not recorded:
                raise ValueError(f"{args.out}: no results yet; run `python kernels/benchmarks/run.py` first")
            judged = verdicts([row for path in recorded for row in read(path)], args.device)
            print("\n".join(map(str, judged)))
            return int(any(verdict.holds is False for verdict in judged))
        if args.dispatch:
            print("\n".join(dispatch(read(csv))))
            return 0
        if not args.plot:
            print(table(_measure(args, _device(args.device), csv)))
        paths = [csv, *_draw(csv)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("results:", *paths)
    if args.copy_to:
        args.copy_to.mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copy(path, args.copy_to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
