"""What decoding processes need of the machine: shared memory, open files, and whether they hand over batches at all."""

from __future__ import annotations

import itertools
import resource
import shutil
import time
from collections.abc import Iterator
from typing import Any

from megakd.doctor.finding import Finding, Place

# A rank's part of a global batch as ordinary runs have it: pictures for a student and a teacher, 8 bit a colour.
PAIRS, TOWERS, SIZE = 256, 2, 224
BATCH_BYTES = PAIRS * TOWERS * 3 * SIZE * SIZE
BATCHES = 6
# Of one process: torch, CUDA and Python's own files and sockets, and the tensors of a batch, each of which is a file.
OTHER_FILES, BATCH_FILES = 256, 8
SHARED_MEMORY = "/dev/shm"


def shared_memory(_: Place) -> Iterator[Finding]:
    """Room for the batches that loader processes hold ready, of all ranks of this machine."""
    import torch

    from megakd.runtime import failures

    ranks, workers = max(1, torch.cuda.device_count()), _workers()
    needed, disk = ranks * _ready(workers) * BATCH_BYTES, shutil.disk_usage(SHARED_MEMORY)
    facts = {"free_bytes": disk.free, "total_bytes": disk.total, "needed_bytes": needed, "ranks": ranks, "workers": workers}
    said = f"{disk.free / 1e9:.2f} GB free of {disk.total / 1e9:.2f} GB in {SHARED_MEMORY}"
    wanted = (
        f"{ranks} rank{'s' * (ranks > 1)} with data.workers = {workers} and {PAIRS} pairs of {TOWERS} towers each want {needed / 1e9:.2f}"
    )
    if disk.free >= needed:
        yield Finding("shared_memory", "ok", f"{said}; {wanted}", facts=facts)
    else:
        yield Finding("shared_memory", "fails", f"{said}; {wanted}", failures.SHARED_MEMORY, facts)


def open_files(_: Place) -> Iterator[Finding]:
    """The limit of a process against the shards that one keeps open and the tensors under way, each a file."""
    from megakd.data.storage import OPEN_FILES

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OPEN_FILES + OTHER_FILES + BATCH_FILES * _ready(_workers())
    facts = {"soft": _number(soft), "hard": _number(hard), "needed": needed}
    said = f"a process may have {_shown(soft)} open, up to {_shown(hard)} where it asks; one wants up to {needed}"
    if soft == resource.RLIM_INFINITY or soft >= needed:
        yield Finding("open_files", "ok", said, facts=facts)
        return
    if hard == resource.RLIM_INFINITY or hard >= needed:
        most = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
        remedy = f"ulimit -n {most} in the shell that starts the run; in slurm/env.sh for jobs"
    else:
        remedy = f"the administrator raises the limit (LimitNOFILE, /etc/security/limits.conf; docker --ulimit nofile=65536) above {needed}"
    yield Finding("open_files", "fails", said, remedy, facts)


def processes(_: Place) -> Iterator[Finding]:
    """Real batches from real loader processes, by the stream that training reads."""
    import torch

    from megakd.data.stream import WorkerStream

    workers = _workers()
    if shutil.disk_usage(SHARED_MEMORY).free < _ready(workers) * BATCH_BYTES:
        said = f"not tried: {SHARED_MEMORY} has no room for their batches"
        yield Finding("processes", "fails", said, "as of loader.shared_memory", {"workers": workers})
        return

    class Pictures:
        def __getitems__(self, numbers: list[int]) -> list[torch.Tensor]:
            return [torch.full((PAIRS, 3, SIZE, SIZE), numbers[0], dtype=torch.uint8) for _ in range(TOWERS)]

    stream: WorkerStream[list[torch.Tensor]] = WorkerStream(Pictures(), ([number] for number in range(BATCHES)), workers, False)
    began = time.perf_counter()
    try:
        for expected, pictures in zip(itertools.count(), stream, strict=False):
            if any(int(each[-1, 0, 0, 0]) != expected for each in pictures):
                raise ArithmeticError("a loader process handed over another batch than it made")
    finally:
        stream.close()
    seconds = time.perf_counter() - began
    facts: dict[str, Any] = {
        "workers": workers,
        "bytes_per_second": BATCHES * BATCH_BYTES / seconds,
        "pairs_per_second": BATCHES * PAIRS / seconds,
    }
    said = (
        f"{workers} hand over {facts['bytes_per_second'] / 1e9:.2f} GB/s, {facts['pairs_per_second']:,.0f} pairs/s, with nothing to decode"
    )
    yield Finding("processes", "ok", said, facts=facts)


def _workers() -> int:
    from megakd.recipe import Data

    workers: int = Data.model_fields["workers"].default
    return workers


def _ready(workers: int) -> int:
    """Batches in shared memory at once: those that torch lets each process make ahead, and the one at work."""
    from torch.utils.data import DataLoader

    ahead = DataLoader(range(1), num_workers=1).prefetch_factor  # type: ignore[arg-type,var-annotated]  # torch's own, which `WorkerStream` keeps
    return workers * (ahead or 0) + 1


def _number(limit: int) -> int | None:
    """None: none."""
    return None if limit == resource.RLIM_INFINITY else limit


def _shown(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else str(limit)
