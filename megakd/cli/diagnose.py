"""The verb that compares a run's student with a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def diagnose(
    run: Annotated[Path, typer.Argument(help="run folder; its recipe says which teacher, and on which pairs")],
    checkpoint: Annotated[Path | None, typer.Option(help="a checkpoint's folder; default: the newest valid one of the run")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="another teacher: a run folder or a model's, or a name with --set teacher.pretrained=TAG"),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a setting, e.g. evaluation.diagnostics.mine=my/*.tar")
    ] = None,
) -> None:
    """Compare a run's student with its teacher: CKA, rows of similarities, neighbours, entropy, geometry; RUN/diagnostics.json.

    A run without a teacher is compared with that of --teacher. Starts under torchrun as well.
    """
    from megakd.evaluation.diagnostics.run import diagnose_run
    from megakd.runtime.console import quiet_libraries

    quiet_libraries()
    diagnose_run(run, checkpoint, teacher, overrides or [])
