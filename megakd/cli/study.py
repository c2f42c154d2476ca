"""Verbs around studies: grids of runs on one question."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megakd.cli.options import from_fields
from megakd.jobs.resources import Resources


@from_fields
def study(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="name of a shipped study, or a .toml file")],
    *,
    out: Annotated[Path | None, typer.Option(help="folder of the study; default: runs/NAME")] = None,
    at_once: Annotated[
        int, typer.Option("--at_once", min=1, help="runs that share this machine, each of one rank: one a GPU, or a core")
    ] = 2,
    small: Annotated[bool, typer.Option("--small", help="the part of the study that its file calls small: a first answer")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="check, list the cells, what is done and what the rest costs; run nothing")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="show how far the study is, which runs elsewhere, until it ends")] = False,
    gpu: Annotated[str, typer.Option(help="--dry_run: whose hours; a GPU of `megakd plan`, or cpu")] = "h100",
    cluster: Annotated[str, typer.Option(help="local: this machine; slurm: arrays that wait for each other")] = "local",
    wanted: Resources,
) -> None:
    """Train teachers x students x methods x seeds, as the study's file says, and score all of them alike. Killed, the same command goes on.

    `megakd report` makes the page, also while the study runs. The options below are SLURM's, for each run of the grid.
    """
    from megakd.planning.cluster import Cluster
    from megakd.runtime.console import quiet_libraries
    from megakd.study import cluster as arrays
    from megakd.study import progress, run

    quiet_libraries()
    if cluster not in ("local", "slurm"):
        raise ValueError(f"--cluster {cluster}: local or slurm")
    if watch:
        sys.exit(progress.watch(study, out, small=small))
    if cluster == "slurm":
        sys.exit(arrays.submit(study, out, wanted, small=small, dry_run=dry_run))
    if wanted != Resources():
        raise ValueError("SLURM's options are for --cluster slurm; leave them out, or add it")
    if dry_run:
        run.dry_run(study, out, Cluster(gpus=1, memory=80.0, kind=gpu), small=small)
        return
    sys.exit(run.run(study, out, at_once, small=small))
