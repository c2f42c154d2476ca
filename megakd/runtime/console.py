"""What a person reads: a run's lines and its progress bar, tables, and libraries' messages."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megakd.recipe.credentials import keep_out_of_logs, redact

UNKNOWN_WIDTH = 4000  # columns on a pipe or in a log file, where rich takes 80 and would cut cells


def plain(least: int = 0) -> Console:
    """A console for tables and lines: as wide as the terminal, at least `least` columns; elsewhere so wide that nothing is cut."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, least) if console.is_terminal else UNKNOWN_WIDTH
    return console


class RunConsole:
    """A run's lines on standard output, and on a terminal its progress bar. failure: why a line was not written."""

    def __init__(self) -> None:
        self.failure: OSError | None = None
        self._console = Console(stderr=False, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """A line for people, without the credentials in it."""
        try:
            self._console.print(redact(text), markup=False)
        except OSError as error:
            self.failure = self.failure or OSError(error.errno, error.strerror, "standard output")

    def step(self, row: dict[str, Any], total_steps: int) -> None:
        """A row of metrics.jsonl as a line, or as the bar's new state."""
        if not self._console.is_terminal:
            self.say(_line(row, total_steps))
            return
        if self._progress is None:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self._console)
            self._progress.start()
            self._progress.add_task("", total=total_steps)
        self._progress.update(self._progress.task_ids[0], completed=row["step"], description=_summary(row))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


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
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    keep_out_of_logs()
    for chatty in ("torch.utils.cpp_extension", "bitsandbytes.backends.cpu.ops"):  # the latter misses a package that nothing here calls
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|deepspeed\.|transformers\.|peft\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
