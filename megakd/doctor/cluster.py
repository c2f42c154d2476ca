"""SLURM: whether it answers, what it has, and the job that this process is part of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from megakd.doctor.finding import Finding, Place
from megakd.runtime import environment

PROGRAMS = ("sbatch", "srun", "squeue", "sinfo", "scontrol")


def cluster(_: Place) -> Iterator[Finding]:
    """What `megakd submit` and `megakd jobs` would find."""
    from megakd.jobs import slurm

    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if len(missing) == len(PROGRAMS) and "SLURM_JOB_ID" not in os.environ:
        said = "no SLURM on this machine: runs start by deepspeed, torchrun or python"
        yield Finding("cluster", "ok", said, facts={"programs": [], "partitions": []})
        return
    facts = {"programs": [name for name in PROGRAMS if name not in missing], "partitions": []}
    if missing:
        remedy = "submit from a login node (in a container: from outside of it); a job that runs needs none of them"
        yield Finding("cluster", "partly", f"{', '.join(missing)} not found: nothing can be submitted from here", remedy, facts)
        return
    try:
        there = slurm.partitions()
    except ValueError as error:
        remedy = "try again later, or ask whoever runs the cluster; `megakd submit --cluster local` needs none"
        lines = [line for line in str(error).splitlines() if not line.startswith("or run")]
        yield Finding("cluster", "partly", " ".join(dict.fromkeys((lines[0], lines[-1]))), remedy, facts)
        return
    facts["partitions"] = [str(group) for group in there]
    said = "; ".join(f"{group}{' (default)' if group.default else ''}" for group in there) or "SLURM answers, and has no partition"
    yield Finding("cluster", "ok", said, facts=facts)


def job(_: Place) -> Iterator[Finding]:
    """The job that this runs in; no row outside one."""
    environ = os.environ
    number = environment.job_id(environ)
    if number is None:
        return
    names = ("SLURM_JOB_NODELIST", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "SLURM_MEM_PER_NODE", "SLURM_JOB_PARTITION")
    facts: dict[str, object] = {name.removeprefix("SLURM_").lower(): environ.get(name) for name in names}
    facts |= {"id": number, "restarts": environment.restarts(environ), "log": environment.log_path(environ)}
    said = f"job {number} on {facts['job_nodelist']}, tasks {facts['ntasks'] or 1}, restarts {facts['restarts']}"
    yield Finding("job", "ok", f"{said}, log {facts['log'] or 'not known'}", facts=facts)
