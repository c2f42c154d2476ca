"""Whether ranks of this machine meet and sum, by gloo and by NCCL, in processes of their own; and what the launcher's variables say."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megakd.doctor.finding import Finding, Place

PROGRAM = Path(__file__).with_name("one_rank.py")
POLL_SECONDS = 0.1
WAIT_SECONDS = 600.0  # with the ranks' imports, of minutes on a machine that is busy; a rank that hangs ends itself earlier
MOST_GPUS = 8


def launcher(_: Place) -> Iterator[Finding]:
    """This process as a run would see it. Raises the launcher module's ValueError for variables that contradict each other."""
    from megakd.runtime import launch

    found = launch.variables(os.environ)
    size, host = int(found["WORLD_SIZE"]), found["MASTER_ADDR"]
    facts: dict[str, Any] = {"rank": int(found["RANK"]), "size": size, "meet_at": host, "port": int(found["MASTER_PORT"])}
    if size == 1:
        yield Finding("launcher", "ok", "this process is one rank alone", facts=facts)
        return
    said = f"rank {found['RANK']} of {size}, which meet at {host}:{found['MASTER_PORT']}"
    try:
        facts["address"] = socket.getaddrinfo(host, None)[0][4][0]
    except OSError as error:
        remedy = "export MASTER_ADDR=... with the first node's address (hostname -I there), in the batch script before srun"
        yield Finding("launcher", "fails", f"{said}: that name has no address here ({error})", remedy, facts)
    else:
        yield Finding("launcher", "ok", f"{said} ({facts['address']})", facts=facts)


def gloo(_: Place) -> Iterator[Finding]:
    """Two ranks on the CPU."""
    found = _together(2, CUDA_VISIBLE_DEVICES="")
    speed = None if isinstance(found, str) else found["gloo"]
    if speed is None:
        remedy = (
            "ping $(hostname) must answer: put the machine's name into /etc/hosts, or export GLOO_SOCKET_IFNAME=lo for runs on this "
            "machine alone (ip addr lists the interfaces); one rank trains without"
        )
        yield Finding("gloo", "fails", f"two ranks of this machine cannot work together: {found}", remedy, {"error": found})
    else:
        yield Finding("gloo", "ok", f"two ranks sum {speed / 1e9:.2f} GB/s", facts={"bytes_per_second": speed})


def nccl(_: Place) -> Iterator[Finding]:
    """A rank for each GPU; no row without a GPU."""
    import torch

    count = min(torch.cuda.device_count(), MOST_GPUS) if torch.cuda.is_available() else 0
    if count == 0:
        return
    version = ".".join(map(str, torch.cuda.nccl.version()))
    found = _together(count)
    speed = None if isinstance(found, str) else found.get("nccl")
    facts = {"version": version, "ranks": count, "bytes_per_second": speed}
    if speed is None:
        remedy = (
            "export NCCL_DEBUG=INFO and run it again: it names the cause; most often a container's small /dev/shm (--shm-size=16g, "
            "--ipc=host), or a network it should not take (NCCL_SOCKET_IFNAME), or links between GPUs (NCCL_P2P_DISABLE=1 goes around)"
        )
        yield Finding("nccl", "fails", f"NCCL {version}: {count} GPUs cannot work together: {found}", remedy, facts)
    elif count == 1:
        yield Finding("nccl", "ok", f"NCCL {version} starts; with one GPU there is nothing to measure", facts=facts)
    else:
        yield Finding("nccl", "ok", f"NCCL {version}: {count} GPUs sum {speed / 1e9:.1f} GB/s", facts=facts)


def _together(size: int, **variables: str) -> dict[str, float] | str:
    """Bytes a second by backend, of `size` ranks of this machine, or why they do not get there. No process is left."""
    from megakd.runtime.launch import free_port

    shared = {
        **{name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")},  # torchrun's store is not theirs
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        **variables,
    }
    ranks: list[subprocess.Popen[str]] = []
    end = time.monotonic() + WAIT_SECONDS
    with contextlib.ExitStack() as stack:
        # Files, which take any number of lines (NCCL_DEBUG=INFO) while nobody reads.
        said = [[stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")) for _ in "oe"] for _ in range(size)]
        try:
            for rank, (out, errors) in enumerate(said):
                environ = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, "-P", str(PROGRAM)]
                ranks.append(subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, text=True))
            # Where one has failed the others would wait for it.
            while not any(rank.poll() for rank in ranks) and any(rank.poll() is None for rank in ranks):
                if time.monotonic() > end:
                    return f"no answer in {WAIT_SECONDS:.0f} s"
                time.sleep(POLL_SECONDS)
            failed = next((number for number, rank in enumerate(ranks) if rank.returncode), None)
        finally:
            for started in ranks:
                started.kill()
                started.wait()
        out, errors = said[failed or 0]
        out.seek(0)
        errors.seek(0)
        if failed is not None:
            last = errors.read().strip().splitlines()[-1:]
            return f"rank {failed}: " + (last[0] if last else f"it ended with {ranks[failed].returncode}, without a word (-14: it hung)")
        speeds: dict[str, float] = json.loads(out.read().splitlines()[-1])["bytes_per_second"]
        return speeds
