"""The scripts of slurm/, submitted from a folder that looks like the repository, so that logs and runs land in it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from megakd.runtime import checkpoint
from support.runs import REPOSITORY, rows, settings
from support.slurm_cluster import NODES, Cluster
from support.slurm_jobs import job, sbatch, until, wait

STEPS = 100

# One rank a node in place of eight: what stands before a script's name wins over its #SBATCH lines.
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=8G", "--time=10")


def repository(folder: Path) -> Path:
    """A folder with the repository's own scripts, package and JSONs, and the interpreter of these tests in bin/."""
    for name in ("slurm", "megakd", "ds_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "bin").mkdir()
    for name in ("python", "megakd"):
        program = folder / "bin" / name
        target = Path(sys.executable).with_name(name)
        program.write_text(f'#!/bin/sh\nexec "{target}" "$@"\n')
        program.chmod(0o755)
    return folder


def shrunk(world: Path, site: Path) -> list[str]:
    """Arguments that change the sizes alone of slurm/distill_vitbigG.sh: models, batch, steps, data. The teacher stays zero3_int8."""
    student = "{ image_size = 32, patch_size = 8, width = 32, layers = 1, head_width = 16 }"
    teacher = "{ image_size = 48, patch_size = 16, width = 32, layers = 1, head_width = 16 }"
    text = "context_length = 32, vocab_size = 128, width = 32, heads = 2, layers = 1"
    student = f"{{ embed_dim = 16, vision_cfg = {student}, text_cfg = {{ {text} }} }}"
    teacher = f"{{ embed_dim = 24, vision_cfg = {teacher}, text_cfg = {{ context_length = 24, width = 32, heads = 2, layers = 1 }} }}"
    overrides = (
        f"data.train={world}/train/*.tar",
        f"data.cache={site}/cache",
        "data.workers=0",
        f"student={{ tokenizer = '{world}/tokenizer', architecture = {student} }}",
        f"teacher={{ pretrained = 'random', mode = 'zero3_int8', architecture = {teacher} }}",
        f"optim.steps={STEPS}",
        "optim.batch=16",
        "optim.warmup=2",
        "optim.eps=1e-3",
        "log.every=1",
        "evaluation.every=0",
        f"evaluation.zero_shot={{ seen = '{world}/zeroshot' }}",
        f"evaluation.retrieval={{ test = '{world}/test/*.tar' }}",
    )
    return settings(*overrides)


class Script:
    """A submitted script of slurm/: its job, its log where the README promises it, its run folder."""

    def __init__(self, site: Path, name: str, *arguments: object, options: tuple[str, ...] = SMALL) -> None:
        self.id = sbatch(*options, f"slurm/{name}.sh", *arguments)
        self.log_file, self.run = site / f"{name}-{self.id}.log", site / "runs" / f"{name}-{self.id}"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def step(self) -> int:
        """The last step in metrics.jsonl; 0 before there is one."""
        found = rows(self.run)
        return found[-1]["step"] if found else 0

    def reach(self, step: int) -> None:
        until(lambda: self.step() >= step, tell=lambda: f"step {self.step()} of {step}: {job(self.id)}\n{self.log[-4000:]}")


def submit_higher(command: str = "sleep 1") -> str:
    """A job of the higher partition that wants both nodes: it preempts whatever runs there."""
    return sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", command)


@contextlib.contextmanager
def preempted(id: str, folder: Path) -> Iterator[str]:
    """While this lasts, job `id` waits in the queue for a higher one, whose id it gives."""
    free = folder / f"{id}-may-go-on"
    higher = submit_higher(f"until [ -e {shlex.quote(str(free))} ]; do sleep 0.1; done")
    try:
        wait(id, ("PENDING",))
        yield higher
    finally:
        free.touch()


def scontrol(*arguments: str) -> None:
    subprocess.run(["scontrol", *arguments], check=True)


def ranks_of(cluster: Cluster, script: Script) -> dict[str, int]:
    """By node, the process that trains: the eldest of the node's interpreters that carry the run's name."""
    return {node: cluster.node_processes(node, rf"^\S*python\S* megakd/train.py .*--out runs/{script.run.name} ")[0] for node in NODES}


def lost(log: str, run: Path) -> tuple[int, float]:
    """Steps since the newest checkpoint and their seconds, from the log: what a stop without a warning costs."""
    saved = max((int(path.name.removeprefix("step_")) for path in checkpoint.available(run)), default=0)
    lines = re.findall(r"^step (\d+)/.* seconds: (.*)$", log, re.MULTILINE)
    seconds = [sum(map(float, parts.split()[1::2])) for number, parts in lines if int(number) > saved]
    return len(seconds), sum(seconds)


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        os.kill(pid, number)


def connections(pid: int) -> list[tuple[str, int]]:
    """Addresses and ports that processes in the network of `pid` have TCP connections to."""
    found: list[tuple[str, int]] = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            address, number = line.split()[2].split(":")
            # The kernel writes the 32-bit words of an address in its own order; an IPv4 address is the last word of an IPv6 one.
            found.append((socket.inet_ntoa(struct.pack("=I", int(address[-8:], 16))), int(number, 16)))
    return found
