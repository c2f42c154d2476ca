"""Whether all ranks see one folder, found out at the start and not by what is missing at the end."""

from __future__ import annotations

import secrets
import socket
import time
from pathlib import Path

from megakd.runtime import collectives
from megakd.runtime.files import PARTIAL
from megakd.runtime.launch import World

VISIBLE_SECONDS = 40.0  # NFS clients keep for 30 s that a file is missing
CLOCK_SKEW_SECONDS = 60.0


def check(folder: Path, world: World, timeout: float = VISIBLE_SECONDS) -> list[str]:
    """Raise ValueError, on every rank, when one does not see what rank 0 writes into `folder`, which is there. A collective.

    Returns lines for people: clocks that differ, so that times in run.json are not in order.
    """
    if world.size == 1:
        return []
    name = collectives.share(f".seen_{secrets.token_hex(8)}{PARTIAL}", world)
    assert isinstance(name, str)
    collectives.by_main(lambda: (folder / name).touch(), world)
    end = time.monotonic() + timeout
    while not (seen := (folder / name).exists()) and time.monotonic() < end:
        time.sleep(0.1)
    answers = collectives.everyones((seen, socket.gethostname(), str(folder.absolute())), world)
    collectives.by_main(lambda: (folder / name).unlink(missing_ok=True), world)
    without = [(rank, host, place) for rank, (sees, host, place) in enumerate(answers) if not sees]
    if without:
        shown = ", ".join(f"rank {rank} on {host} ({place})" for rank, host, place in without[:4])
        more = f" and {len(without) - 4} more" * (len(without) > 4)
        raise ValueError(
            f"--out {answers[0][2]}: what rank 0 on {answers[0][1]} writes there is not seen by {shown}{more}: give --out a folder on a "
            f"file system that all ranks share, by its absolute path"
        )
    clocks = collectives.everyones(time.time(), world)
    if max(clocks) - min(clocks) > CLOCK_SKEW_SECONDS:
        return [f"the ranks' clocks differ by {max(clocks) - min(clocks):.0f} s: times in logs and run.json are each machine's own"]
    return []
