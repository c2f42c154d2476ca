"""`megakd doctor`: what this machine is fit for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    out: Annotated[Path, typer.Option(help="where runs would write")] = Path("runs"),
    cache: Annotated[Path | None, typer.Option(help="data.cache of your recipe, where it names one")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="versions, devices, ranks, loader, kernels, slurm, disk or network; repeatable; default: all"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the same as one JSON object; its keys: megakd/doctor/README.md")] = False,
) -> None:
    """Look whether training works on this machine: what is ok, what is slow, what fails, and the remedy. Changes nothing; takes 20 s.

    Exit code 0 where training would work, 1 where something that it needs fails. In a SLURM job: srun --ntasks-per-node=1 megakd doctor.
    """
    from megakd.doctor import show
    from megakd.doctor.finding import Place
    from megakd.runtime.console import quiet_libraries

    quiet_libraries()
    sys.exit(show.run(Place(out, cache), only or [], as_json=json))
