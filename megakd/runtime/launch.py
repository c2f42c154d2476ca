"""Which rank am I? The one place that knows torchrun, `deepspeed`, `srun` and a plain `python`.

Each launcher tells a process its rank in its own variables; `start` reads them, writes torch's (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT, which DeepSpeed reads as well) and joins the process group: NCCL for CUDA tensors, gloo for CPU ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """torch's five rendezvous variables as the launcher that started this process means them.

    Raises ValueError when a launcher set only some of its variables.
    """
    if "RANK" in environ:
        missing = [name for name in TORCH_VARIABLES if name not in environ]
        if missing:
            raise ValueError(
                f"RANK is set but {', '.join(missing)} is not: start with torchrun, deepspeed or srun, or unset RANK for one process"
            )
        return {name: environ[name] for name in TORCH_VARIABLES}
    # Only a step started by srun has SLURM_STEP_ID; a batch script's own `python` has SLURM_PROCID too, but it is one process.
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _slurm(environ)
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def _slurm(environ: Mapping[str, str]) -> dict[str, str]:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    # A restarted job must not meet a stale peer of its former life: another port each time.
    port = 20000 + (int(environ["SLURM_JOB_ID"]) * 16 + int(environ.get("SLURM_RESTART_COUNT", "0"))) % 20000
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_ADDR": environ.get("MASTER_ADDR") or shown.stdout.split()[0],
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
    }


def start(timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the process group and choose this rank's device. Returns this process's place in the world."""
    found = variables(os.environ)
    rank, size = int(found["RANK"]), int(found["WORLD_SIZE"])
    os.environ.update(found)
    device = _device(int(found["LOCAL_RANK"]))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # srun --gpus-per-task=1 shows each task one device, number 0, whatever its local rank.
    index = local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def stop() -> None:
    """Leave the process group; without it torch warns at exit, and NCCL may hang."""
    if not dist.is_initialized():
        return
    # DeepSpeed, where the engine has loaded it, remembers groups made from this one and must forget them, or no second start works.
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()
