"""`megakd report`: what a run, a study, or any set of runs has found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    paths: Annotated[list[Path], typer.Argument(help="a run folder, a study's folder, finished or not, or several run folders: runs/*")],
    out: Annotated[
        Path | None,
        typer.Option(help="folder for report.html, report.md, results.csv and figures/; default: the run's or the study's, else ./report"),
    ] = None,
    no_examples: Annotated[
        bool, typer.Option("--no_examples", help="of one run: without questions and neighbours, which need its data and weights")
    ] = False,
) -> None:
    """A page: of one run its health, curves, scores and examples; of a study or several runs tables and the answer, with intervals."""
    from megakd.pages.page import PAGE
    from megakd.runtime.console import quiet_libraries
    from megakd.runtime.run_folder import RUN
    from megakd.study.results import STUDY

    quiet_libraries()
    of_study = len(paths) == 1 and (paths[0] / STUDY).exists()
    asked = ["megakd", "report", *map(str, paths[:3]), *(["..."] if len(paths) > 3 else []), *(["--out", str(out)] if out else [])]
    if len(paths) == 1 and not of_study and (paths[0] / RUN).is_file():
        from megakd.pages.run import page as run_page

        folder = out or paths[0]
        of_run = run_page.make(paths[0], folder, [*asked, *(["--no_examples"] if no_examples else [])], examples=not no_examples)
        print(" ".join((f"{of_run.verdict}.", *(f"{what} {number};" for number, what in of_run.scores))).rstrip(";"))
        print(folder / PAGE)
        return
    if no_examples:
        raise ValueError(
            f"--no_examples: {', '.join(map(str, paths[:3]))} is not one run folder, whose page alone has examples; leave it out"
        )
    from megakd.study import found_runs
    from megakd.study.report import page

    results = found_runs.read(paths)
    folder = out or (paths[0] if of_study else Path("report"))
    made = page.make(results, folder, asked)
    print(made.answer.text)
    print(folder / PAGE)
