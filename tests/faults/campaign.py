"""Damaged files and mistaken settings, by the hundred: nothing may end in a traceback, hang, or lose data without a word.

Each module `*_faults.py` beside this one is a family: it defines NAME, COUNT (its full number of mutants), LIMIT (seconds for one) and
`mutants(count, draw, folder)`, a generator of `Mutant`s. `make faults` runs all of them, `make faults FAULTS="--family tars --count 50
--seed 7"` a part of one. Exit code 1 when any mutant ended in a way that a user should never see.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Protocol, TypeVar

HERE = Path(__file__).parent
# What may happen to a mutant. sound: it is harmless, and the result is that of the unharmed original. refused: one message of megakd's,
# no traceback. told: it is used in part, and the program counts exactly what is missing. older: an older good state is used, and said.
GOOD = ("sound", "refused", "told", "older")
# silent: a loss or a wrong value without a word, or a count that is not the true one.
BAD = ("silent", "traceback", "hang")


class SilentFault(AssertionError):
    """Raised by a mutant's check when the program went on without saying what was lost or is wrong."""


class Hang(BaseException):
    """Past all handlers of `Exception`: the mutant took longer than its family's limit."""


@dataclass(frozen=True)
class Mutant:
    """name: what was done, for people, complete enough to do it again. attempt: runs the program on it and returns one of GOOD.

    It raises SilentFault for a silent fault; ValueError raised by megakd counts as refused, every other exception as a traceback.
    """

    name: str
    attempt: Callable[[], str]


class Sound(Protocol):
    """What was written before any damage."""

    @property
    def folder(self) -> Path: ...


Original = TypeVar("Original", bound=Sound)


def mutants_of_copies(
    count: int,
    draw: random.Random,
    folder: Path,
    originals: list[Original],
    damage: Callable[[Path, random.Random], str],
    attempt: Callable[[Original, Path], str],
) -> Iterator[Mutant]:
    """A copy of one original's folder for each mutant: `damage` changes it and says how, `attempt` runs the program on it."""
    for number in range(count):
        original, copied = draw.choice(originals), folder / f"mutant_{number}"
        shutil.copytree(original.folder, copied)
        name = damage(copied, draw)
        yield Mutant(f"{original.folder.name}, {name}", functools.partial(attempt, original, copied))
        shutil.rmtree(copied)


@dataclass(frozen=True)
class Result:
    mutant: str
    verdict: str
    detail: str


def families() -> dict[str, ModuleType]:
    """By name. Each runs alone, so a family's imports cost nothing to the others' start."""
    modules = [importlib.import_module(f"faults.{path.stem}") for path in sorted(HERE.glob("*_faults.py"))]
    return {module.NAME: module for module in modules}


def verdict_of_command(code: int, error: str) -> str:
    """Of the training program or a verb that ended: exit code 0 is "sound", 2 with one message is "refused"; raises otherwise."""
    if code == 0:
        return "sound"
    if "Traceback" in error or code != 2 or not error.strip():
        raise RuntimeError(f"exit code {code}: {error[-2000:]}")
    return "refused"


def run_family(family: ModuleType, count: int, seed: int, folder: Path) -> Iterator[Result]:
    """The results of `count` mutants, drawn from `seed`."""
    draw = random.Random(f"{family.NAME}/{seed}")
    log = logging.getLogger("megakd.data")  # what it says of each damaged sample is checked by its counts
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        for mutant in family.mutants(count, draw, folder):
            yield _attempt(mutant, family.LIMIT)
    finally:
        log.setLevel(level)


def _attempt(mutant: Mutant, limit: float) -> Result:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return Result(mutant.name, mutant.attempt(), "")
    except Hang:
        return Result(mutant.name, "hang", f"longer than {limit} s")
    except SilentFault as error:
        return Result(mutant.name, "silent", str(error))
    except ValueError as error:
        return _of_value_error(mutant, error)
    except (Exception, SystemExit) as error:
        return Result(mutant.name, "traceback", f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _of_value_error(mutant: Mutant, error: ValueError) -> Result:
    """Refused, where megakd says so itself; a library's ValueError that came through is a traceback in the making."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = any(Path(innermost).is_relative_to(HERE.parents[1] / part) for part in ("megakd", "kernels/megakd_kernels"))
    if ours and str(error).strip():
        return Result(mutant.name, "refused", str(error))
    return Result(mutant.name, "traceback", f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}")


def report(name: str, results: list[Result], seconds: float, most: int) -> bool:
    """Print the counts of one family and its first bad mutants. Returns whether all were good."""
    counts = Counter(result.verdict for result in results)
    unknown = set(counts) - {*GOOD, *BAD}
    assert not unknown, f"{name}: verdicts {unknown}"
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (*GOOD, *BAD) if counts[verdict])
    print(f"{name}: {len(results)} mutants in {seconds:.0f} s: {said}", flush=True)
    bad = [result for result in results if result.verdict in BAD]
    for result in bad[:most]:
        print(f"  {result.verdict}: {result.mutant}\n    {result.detail.strip()[-1500:]}", flush=True)
    if len(bad) > most:
        print(f"  and {len(bad) - most} more", flush=True)
    return not bad


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    flags.add_argument("--family", action="append", help="one of the families; may be repeated; default: all")
    flags.add_argument("--count", type=int, help="mutants of each family; default: the family's own number")
    flags.add_argument("--seed", type=int, help="default: 0 and then a fresh one, which is printed")
    flags.add_argument("--most", type=int, default=5, help="bad mutants to show of each family")
    asked = flags.parse_args()
    known = families()
    if unknown := set(asked.family or known) - set(known):
        flags.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    good = True
    for seed in [0, int.from_bytes(os.urandom(4), "big")] if asked.seed is None else [asked.seed]:
        print(f"seed {seed}", flush=True)
        for name in asked.family or known:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix=f"faults-{name}-") as folder:
                results = list(run_family(known[name], asked.count or known[name].COUNT, seed, Path(folder)))
            good &= report(name, results, time.perf_counter() - start, asked.most)
    return 0 if good else 1
