"""What a person reads: a run's lines and its progress bar, tables, and libraries' messages."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megakd.recipe.credentials import keep_out_of_logs, redact

T = TypeVar("T")
UNKNOWN_WIDTH = 4000  # columns on a pipe or in a log file, where rich takes 80 and would cut cells
QUIET_SECONDS = 5.0  # work that is done by then is not mentioned
LINE_SECONDS = 30.0  # from one line about it to the next, where there is no terminal
_DRAW_SECONDS = 0.1
_ONE_WORK_SECONDS = 1.0  # between works of one name that count as one


def plain(least: int = 0) -> Console:
    """A console for tables and lines: as wide as the terminal, at least `least` columns; elsewhere so wide that nothing is cut."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, least) if console.is_terminal else UNKNOWN_WIDTH
    return console


class _Screen:
    """What is drawn below the lines of a terminal: a bar for each piece of work. One a process: two would draw over each other."""

    def __init__(self) -> None:
        self._bars: Progress | None = None

    def add(self, console: Console, what: str, total: float, unit: str, *, shown: bool, stays: bool) -> TaskID:
        """A bar, on `console` where there is no other yet. stays: what is drawn last stays on the terminal."""
        if self._bars is None:
            columns = (*_texts("what"), BarColumn(), *_texts("count"), TimeRemainingColumn(), *_texts("more"))
            # rich writes what is printed to `console`: not where it was meant for a file
            self._bars = Progress(
                *columns,
                console=console,
                transient=not stays,
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
        return self._bars.add_task("", total=total, visible=shown, what=what, unit=unit, count="", more="")

    def update(self, task: TaskID, done: float, *, shown: bool = True, more: str = "") -> None:
        if self._bars is not None:
            of = self._bars.tasks[self._bars.task_ids.index(task)]
            count = amounts(done, of.total or 0, of.fields["unit"])
            self._bars.update(task, completed=done, visible=shown, count=count, more=more)
            if shown:
                self._bars.start()

    def remove(self, task: TaskID) -> None:
        if self._bars is None:
            return
        if self._bars.task_ids == [task]:
            self._bars.stop()
            self._bars = None
        else:
            self._bars.remove_task(task)

    def forget(self) -> None:
        """In a process that was forked: the terminal is the other one's to draw on, and a lock may be held by a thread that is not here."""
        self._bars = None
        sys.stdout, sys.stderr = (getattr(stream, "rich_proxied_file", stream) for stream in (sys.stdout, sys.stderr))


_screen = _Screen()
os.register_at_fork(after_in_child=_screen.forget)


def _texts(field: str) -> tuple[TextColumn, ...]:
    return (TextColumn(f"{{task.fields[{field}]}}", markup=False),)


def _is_live(console: Console) -> bool:
    """Whether something can be drawn again and again."""
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


def amounts(done: float, total: float, unit: str) -> str:
    """ "1,200 of 48,000 samples", "0.3 of 1.2 GB" where the unit is bytes."""
    if unit != "bytes":
        return f"{done:,.0f} of {total:,.0f} {unit}"
    size, name = next(((size, name) for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if total >= size), (1e3, "kB"))
    return f"{done / size:,.1f} of {total / size:,.1f} {name}"


class LongWork:
    """How far a piece of work is: on a terminal a bar with the time left, elsewhere a line now and then. A context manager.

    what: what is done, as "indexing". total: in `unit`s, a plural noun; of "bytes" in MB or GB. It is said on standard error, by the main
    rank alone, and only from QUIET_SECONDS on: works whose first word is the same and that follow each other at once are one for that.
    Where a run has its bar on the terminal, this one is drawn beside it. coarse: its units take long each, so that QUIET_SECONDS are
    told by a timer and not by the end of the unit in which they pass.
    """

    _latest = ("", 0.0, 0.0, 0.0)  # the work before: its first word, when it began and ended, when its next line was due

    def __init__(self, what: str, total: float, unit: str, clock: Callable[[], float] = time.monotonic, *, coarse: bool = False) -> None:
        self._what, self._total, self._unit, self._clock = what, total, unit, clock
        self._done = 0.0
        self._began = self._drawn = clock()
        word, since, ended, line = LongWork._latest
        joined = word == what.partition(" ")[0] and 0 <= self._began - ended < _ONE_WORK_SECONDS
        self._since = since if joined else self._began
        self._line = line if joined else self._began + QUIET_SECONDS
        # torch's variable, which `launch.start` sets under every launcher
        self._is_said = total > 0 and os.environ.get("RANK", "0") == "0"
        console = Console(stderr=True, highlight=False)
        is_drawn = self._is_said and _is_live(console)
        self._task = _screen.add(console, what, total, unit, shown=False, stays=False) if is_drawn else None
        self._timer = threading.Timer(QUIET_SECONDS, self._say_that_it_runs) if coarse and self._is_said else None
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def advance(self, done: float = 1) -> None:
        """So much more is done."""
        self._done = min(self._done + done, self._total)
        if not self._is_said:
            return
        now = self._clock()
        if self._task is not None:
            if now - self._drawn >= _DRAW_SECONDS:
                self._drawn = now
                _screen.update(self._task, self._done, shown=now - self._since >= QUIET_SECONDS)
        elif now >= self._line and 0 < self._done < self._total:
            self._line = now + LINE_SECONDS
            left = _duration((now - self._began) * (self._total - self._done) / self._done)
            self._print(f"{amounts(self._done, self._total, self._unit)}, about {left} left")

    def _say_that_it_runs(self) -> None:
        """On the timer's thread, before the first unit is done or between two."""
        if self._task is not None:
            _screen.update(self._task, self._done)
        elif self._done == 0:
            self._print(amounts(0, self._total, self._unit))

    def _print(self, how_far: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads, or the stream is closed: the work goes on
            print(f"{self._what}: {how_far}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # or it would draw a bar that is gone
        LongWork._latest = (self._what.partition(" ")[0], self._since, self._clock(), self._line)
        if self._task is not None:
            _screen.remove(self._task)
            self._task = None

    def __enter__(self) -> LongWork:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def with_progress(items: Iterable[T], what: str, unit: str, total: float | None = None, *, coarse: bool = False) -> Iterator[T]:
    """The items, each of which is one `unit` of a LongWork once the next is asked for. total: how many, of items without a length."""
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    with LongWork(what, total, unit, coarse=coarse) as work:
        for item in items:
            yield item
            work.advance()


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{hours:.1f} h"


class RunConsole:
    """A run's lines on standard output, and on a terminal its progress bar. failure: why a line was not written."""

    def __init__(self) -> None:
        self.failure: OSError | None = None
        self._console = Console(stderr=False, highlight=False, soft_wrap=True)
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """A line for people, without the credentials in it."""
        try:
            self._console.print(redact(text), markup=False)
        except OSError as error:
            self.failure = self.failure or OSError(error.errno, error.strerror, "standard output")

    def step(self, row: dict[str, Any], total_steps: int) -> None:
        """A row of metrics.jsonl as a line, or as the bar's new state."""
        if not _is_live(self._console):
            self.say(_line(row, total_steps))
            return
        if self._task is None:
            self._task = _screen.add(self._console, "training", total_steps, "steps", shown=True, stays=True)
        _screen.update(self._task, row["step"], more=_summary(row))

    def close(self) -> None:
        if self._task is not None:
            _screen.remove(self._task)
            self._task = None


def _summary(row: dict[str, Any]) -> str:
    parts = " ".join(f"{name} {value:.4f}" for name, value in row["losses"].items())
    return f"loss {row['loss']:.4f} ({parts}) | {row['images_per_second']:.0f} images/s | lr {row['lr']:.2e}"


def _line(row: dict[str, Any], total_steps: int) -> str:
    seconds = " ".join(f"{name} {value:.2f}" for name, value in row["seconds"].items())
    scale = f"scale {row['scale']:.2f} | " if "scale" in row else ""
    extra = f"{scale}norm {row['gradient_norm']:.3f} | {row['memory_gb']:.2f} GB | seconds: {seconds}"
    return f"step {row['step']}/{total_steps} | {_summary(row)} | {extra}"


def quiet_libraries() -> None:
    """Leave the console to the run: libraries log from warnings up, without torch's deprecations inside DeepSpeed."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", handlers=[_StandardError()])
    keep_out_of_logs()
    for chatty in ("torch.utils.cpp_extension", "bitsandbytes.backends.cpu.ops"):  # the latter misses a package that nothing here calls
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|deepspeed\.|transformers\.|peft\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class _StandardError(logging.StreamHandler[Any]):
    """Lines to standard error as it is when they come: above a bar, where one is drawn."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        """The base class sets what it is not to keep."""
