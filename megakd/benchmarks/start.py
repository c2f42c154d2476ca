"""The start of a run: processor seconds of `train.py --dry_run` of smoke beside those of importing the libraries it stands on, and the
reading of a set's indexes at a resume.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.table import Table

from megakd.benchmarks.common import comparison
from megakd.benchmarks.common.children import environ
from megakd.data import tar_index
from megakd.data.set_index import SMALLEST
from megakd.data.shapes import write_world
from megakd.data.shards import ShardSet
from megakd.data.storage import SET_INDEX
from megakd.recipe import Data
from megakd.runtime import environment
from megakd.runtime.console import plain

DRY_RUN_TARGET, INDEX_TARGET, INDEX_SHARDS = 5.0, 2.0, 1000  # processor seconds, seconds, of so many shards
TRAIN = Path(__file__).parents[1] / "train.py"
# Without the collector, as train.py has it: the least that a program on these libraries pays.
SIDES = {
    "import torch": ["-c", "import gc; gc.disable(); import torch"],
    "import torch, deepspeed, open_clip": ["-c", "import gc; gc.disable(); import torch, deepspeed, open_clip"],
    "train.py --dry_run of smoke": [str(TRAIN), "--dry_run"],
}
SAMPLES = 1000  # a shard of the set whose indexes are read


class Seconds(NamedTuple):
    """processor: user and system time, of the process and its children."""

    processor: float
    wall: float


def run(rounds: int, shards: list[int], file: Path | None = None) -> None:
    """Measure in turns, print two tables with verdicts and a line of JSON, and write the latter to `file`.

    shards: sizes of the sets whose indexes are read. Raises ValueError where a program fails, with its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="megakd-bench-") as name:
        folder = Path(name)
        write_world(folder / "data" / "shapes", train=512, test=60, caption_noise=0.5, zeroshot_per_class=2)
        starts: dict[str, list[Seconds]] = {side: [] for side in SIDES}
        for number in range(-1, rounds):
            for side, arguments in SIDES.items():
                spent = _program(arguments, folder)
                if number >= 0:  # the first round writes byte code, indexes and the disk's cache
                    starts[side].append(spent)
            print(f"round {number + 1}/{rounds}" if number >= 0 else "warmed up", flush=True)
        plain().print(_starts(starts))
        reads = {count: index_seconds(folder / f"set_{count}", count, rounds) for count in shards}
    plain().print(_reads(reads))
    where = comparison.conditions(environment.versions(("torch", "open_clip_torch", "transformers", "torchvision")), 1)
    row = {
        "benchmark": "bench start",
        "starts": starts,
        "reads": {str(count): read for count, read in reads.items()},
        "targets": {"dry_run": DRY_RUN_TARGET, "index": INDEX_TARGET, "index_shards": INDEX_SHARDS},
        "settings": {"rounds": rounds, "shards": shards, "samples": SAMPLES},
        **where,
    }
    comparison.record(row, file)


def index_seconds(folder: Path, shards: int, rounds: int) -> dict[str, list[Seconds]]:
    """Seconds of opening a set of `shards` shards of SAMPLES samples in `folder`, which is made: "each", of reading every index, as a start
    does before the set has its file, and "resume", of every later start. In turns, in this process, by one rank.

    The shards are links to one tar, their indexes to its index: an open costs what it costs of as many files, a reading disk less.
    """
    pattern = _linked(folder, shards)
    found: dict[str, list[Seconds]] = {"each": [], "resume": []}
    for _ in range(rounds):
        for stored in folder.glob(f"*{SET_INDEX}"):
            stored.unlink()
        for kind in found:
            clock, processor = time.perf_counter(), time.process_time()
            opened = ShardSet.open_set(pattern, Data(), 0, 1, lambda: None, captions=True)
            found[kind].append(Seconds(time.process_time() - processor, time.perf_counter() - clock))
            assert len(opened) == shards * SAMPLES
    return found


def _linked(folder: Path, shards: int) -> str:
    folder.mkdir(parents=True)
    first = folder / "00000.tar"
    with tarfile.open(first, "w") as tar:
        for number in range(SAMPLES):
            for extension, content in (("jpg", bytes(200)), ("txt", b"a caption of some words"), ("json", b"{}")):
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    ShardSet.open_set(str(first), Data(), 0, 1, lambda: None, captions=True)
    (index,) = folder.glob(f"*{tar_index.INDEX}")
    for number in range(1, shards):
        for one in (first, index):
            _link(one, folder / one.name.replace(first.stem, f"{number:05d}", 1))
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def _link(one: Path, other: Path) -> None:
    try:
        os.link(one, other)
    except OSError:  # a file system without links, or with no more of this one
        shutil.copy2(one, other)


def _program(arguments: list[str], folder: Path) -> Seconds:
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environ(1), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    wall, after = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = "\n  ".join((done.stdout + done.stderr).splitlines()[-15:])
        raise ValueError(f"{' '.join(arguments)} ended with exit code {done.returncode}. Its last lines:\n  {last}")
    return Seconds(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def _verdict(seconds: float, target: float) -> str:
    return f"{'reached' if seconds <= target else 'missed'}: {seconds:.2f} of {target:g}"


def _starts(starts: dict[str, list[Seconds]]) -> Table:
    table = Table("program", "processor s", "wall s", "single rounds, processor s", "verdict", title="start of a run", title_justify="left")
    for side, spent in starts.items():
        middle = median(one.processor for one in spent)
        verdict = _verdict(middle, DRY_RUN_TARGET) if side == list(starts)[-1] else ""
        singly = ", ".join(f"{one.processor:.2f}" for one in spent)
        table.add_row(side, f"{middle:.2f}", f"{median(one.wall for one in spent):.2f}", singly, verdict)
    *_, libraries, ours = starts.values()
    own = median(one.processor - other.processor for one, other in zip(ours, libraries, strict=True))
    table.caption = f"beside its libraries, the dry run takes {own:.2f} processor s: the median of the rounds' differences"
    return table


def _reads(reads: dict[int, dict[str, list[Seconds]]]) -> Table:
    title = f"indexes of a set read, shards of {SAMPLES} samples, one rank"
    columns = ("shards", "each index: processor s", "resume: processor s", "resume: wall s", "verdict")
    table = Table(*columns, title=title, title_justify="left")
    for count, read in reads.items():
        each, resume = (median(one.processor for one in read[kind]) for kind in ("each", "resume"))
        wall = median(one.wall for one in read["resume"])
        verdict = _verdict(max(resume, wall), INDEX_TARGET) if count == INDEX_SHARDS else ""
        table.add_row(f"{count:,}", f"{each:.3f}", f"{resume:.3f}", f"{wall:.3f}", verdict)
    table.caption = f"sets of fewer than {SMALLEST} shards have no file of their own: both columns read each index"
    return table
