"""`megakd report`: what a study, or any set of runs, has found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    paths: Annotated[list[Path], typer.Argument(help="a study's folder, finished or not, or run folders: runs/*")],
    out: Annotated[
        Path | None, typer.Option(help="folder for report.html, report.md, results.csv and figures/; default: the study's, else ./report")
    ] = None,
) -> None:
    """A page with tables, figures and the answer to the study's question, with intervals; the same as Markdown and CSV."""
    from megakd.runtime.console import quiet_libraries
    from megakd.study import found_runs
    from megakd.study.report import page
    from megakd.study.results import STUDY

    quiet_libraries()
    results = found_runs.read(paths)
    folder = out or (paths[0] if len(paths) == 1 and (paths[0] / STUDY).exists() else Path("report"))
    asked = ["megakd", "report", *map(str, paths[:3]), *(["..."] if len(paths) > 3 else []), *(["--out", str(out)] if out else [])]
    made = page.make(results, folder, asked)
    print(made.answer.text)
    print(folder / page.PAGE)
