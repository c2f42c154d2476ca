"""Where a step's time goes, by torch's own profiler: a trace for chrome://tracing or Perfetto, and a table of operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

BEFORE = 2  # steps of a start that are not recorded: they fill allocators and queues, and the profiler's own first one is slow
TRACE, TABLE = "trace.json.gz", "operators.txt"
ROWS = 40  # of the table


@contextmanager
def recording(steps: int, folder: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """What is to be called after each step of a run; torch's profiler records `steps` of them, the third and those behind it.

    `folder` then holds both files; of a run that ends before, what it recorded, if anything. 0 steps: nothing is recorded.
    """
    if not steps:
        yield lambda: None
        return

    def write(profiler: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / TRACE))
        first = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages(group_by_input_shape=True).table(sort_by=first, row_limit=ROWS, max_name_column_width=60)
        (folder / TABLE).write_text(table + "\n", encoding="utf-8")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    schedule = torch.profiler.schedule(wait=BEFORE - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step
