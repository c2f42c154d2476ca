"""Processors, memory and GPUs that this process may use, and the type that models compute in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megakd.doctor.finding import Finding, Place
from megakd.runtime import environment

GB = 1e9
LEAST_MEMORY = 4 * GB  # a rank on a CPU with its loader's processes, at the smallest
CGROUPS = Path("/sys/fs/cgroup")


def processors(_: Place) -> Iterator[Finding]:
    """Cores against the ranks of this machine, one a GPU, each with data.workers processes beside it."""
    import torch

    from megakd.recipe import Data

    cores, ranks, workers = usable_cores(), max(1, torch.cuda.device_count()), Data.model_fields["workers"].default
    kind = f"{environment.device_name() if not torch.cuda.is_available() else 'CPU'}, {torch.backends.cpu.get_cpu_capability()}"
    facts = {
        "cores": cores,
        "machine_cores": os.cpu_count(),
        "ranks": ranks,
        "workers": workers,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    said = f"{cores} of {os.cpu_count()} cores may be used ({kind})"
    if cores >= ranks * (1 + workers):
        yield Finding("processors", "ok", said, facts=facts)
        return
    fewer = max(1, cores // ranks - 1)
    remedy = f"--set data.workers={fewer}" if fewer < workers else "expect decoding to be the slowest part"
    yield Finding(
        "processors",
        "slow",
        f"{said}; {ranks} rank{'s' * (ranks > 1)} with data.workers = {workers} decoding processes each would use {ranks * (1 + workers)}",
        f"{remedy}; in a SLURM job ask for more (--cpus-per-task={1 + workers}), in a container too (docker --cpus)",
        facts,
    )


def usable_cores() -> int:
    """By this process's mask, and by its control group's quota, which containers have."""
    cores = len(os.sched_getaffinity(0))
    for quota in _control_group("cpu.max"):
        allowed, _, period = quota.partition(" ")
        if allowed.isdecimal() and period.isdecimal():
            cores = min(cores, max(1, int(allowed) // int(period)))
    return cores


def memory(_: Place) -> Iterator[Finding]:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limits = [int(limit) for limit in _control_group("memory.max") if limit.isdecimal()]
    allowed = min([total, *limits])
    free = min(free, allowed)
    facts = {"total_bytes": total, "allowed_bytes": allowed, "available_bytes": free}
    said = f"{free / GB:.1f} GB free of {allowed / GB:.1f} GB" + (f" that this job may use of {total / GB:.0f} GB" if limits else "")
    if free >= LEAST_MEMORY:
        yield Finding("memory", "ok", said, facts=facts)
    else:
        remedy = "end other programs; in a SLURM job ask for more (--mem), in a container too (docker --memory)"
        yield Finding("memory", "partly", f"{said}: enough for the smallest models alone", remedy, facts)


def _control_group(name: str) -> Iterator[str]:
    """The values of a limit of this process's control group and of those around it (cgroup v2)."""
    line = next((line for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines() if line.startswith("0::")), "0::/")
    group = CGROUPS / line[len("0::/") :]
    while group.is_relative_to(CGROUPS):
        if (file := group / name).is_file():
            yield file.read_text(encoding="utf-8").strip()
        group = group.parent


def gpus(_: Place) -> Iterator[Finding]:
    """Each GPU that torch sees, by a product on it; or why there is none."""
    import torch
    from torch.utils import collect_env

    built = torch.version.cuda
    if not torch.cuda.is_available():
        yield _no_gpu(built, collect_env.get_gpu_info(collect_env.run))
        return
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        ones = torch.ones(64, 64, device=f"cuda:{number}")
        if not bool(((ones @ ones) == 64).all()):
            raise ArithmeticError(f"GPU {number} ({properties.name}) computes wrong numbers")
        capability = f"{properties.major}.{properties.minor}"
        facts = {
            "name": properties.name,
            "capability": capability,
            "total_bytes": total,
            "free_bytes": free,
            "cuda": built,
            "driver": driver,
        }
        said = f"{properties.name}, capability {capability}, {free / GB:.0f} of {total / GB:.0f} GB free; CUDA {built}, driver {driver}"
        if free < total / 2:
            remedy = (
                "nvidia-smi names the processes: end them, or choose another with CUDA_VISIBLE_DEVICES; `megakd plan` says what a run needs"
            )
            yield Finding(f"gpu{number}", "partly", f"{said}: another program holds most of its memory", remedy, facts)
        else:
            yield Finding(f"gpu{number}", "ok", said, facts=facts)


def _no_gpu(built: str | None, listed: str | None) -> Finding:
    """The row where torch sees none. listed: what nvidia-smi lists."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    promised = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    promised = "" if promised == "0" else promised
    facts = {"cuda": built, "listed": listed, "cuda_visible_devices": hidden, "slurm_gpus": promised}
    if not listed and not promised:
        remedy = "enough for `megakd smoke`; for models of ordinary size use a machine with an NVIDIA GPU (SLURM: --gpus-per-node)"
        return Finding("gpus", "slow", "none: models compute on the CPU", remedy, facts)
    if hidden is not None and hidden.strip() in ("", "-1"):
        remedy = "unset CUDA_VISIBLE_DEVICES to use them"
        return Finding("gpus", "slow", f"hidden by CUDA_VISIBLE_DEVICES = {hidden!r}: models compute on the CPU", remedy, facts)
    what = f"nvidia-smi lists {len(listed.splitlines())}" if listed else f"SLURM gave this job {promised}"
    if built is None:
        return Finding(
            "gpus", "fails", f"{what}, and this torch is built for CPUs alone", "pip install -U torch from an index with CUDA", facts
        )
    remedy = (
        "run nvidia-smi on this machine: a driver that is too old for it is updated, or torch installed for an older CUDA; a container "
        "needs --gpus all (apptainer --nv); a cluster's GPUs must be NVIDIA's"
    )
    return Finding("gpus", "fails", f"{what}, and torch (CUDA {built}) can use none: training would run on the CPU", remedy, facts)


def precision(_: Place) -> Iterator[Finding]:
    """The type that `runtime.precision` decides on. Raises its ValueError for a variable that holds another."""
    import torch

    from megakd.runtime import precision as types

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = types.of(device)
    facts = {"precision": chosen, "device": device.type, "variable": os.environ.get(types.VARIABLE)}
    said = f"models compute in {chosen} on the {'GPU' if device.type == 'cuda' else 'CPU'}"
    if chosen == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        remedy = f"export {types.VARIABLE}=fp32, or use a GPU of capability 8.0 (A100) or later"
        yield Finding("precision", "slow", f"{said}, which this GPU only imitates", remedy, facts)
    elif chosen == "bf16" and device.type == "cpu":
        yield Finding("precision", "slow", f"{said}, to rehearse what a GPU does", f"unset {types.VARIABLE} to train on this CPU", facts)
    else:
        yield Finding("precision", "ok", said, facts=facts)
