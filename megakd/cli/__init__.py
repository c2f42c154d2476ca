"""`megakd <verb>`: everything beside training itself. Each verb imports what it needs when it is called, so that --help is instant."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from megakd.cli import bench, data, diagnose, doctor, export, report, runs, study, vqa
from megakd.runtime.exits import EXIT_USER_ERROR
from megakd.version import __version__

app = typer.Typer(
    epilog="Training is a program of its own: deepspeed megakd/train.py --recipe NAME; its flags: python megakd/train.py --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
helpers = typer.Typer(help="What is in shards, and a tokenizer for their captions.", no_args_is_help=True)
benchmarks = typer.Typer(help="Side-by-side benchmarks against the field's own tools.", no_args_is_help=True)


def _version(asked: bool) -> None:
    if asked:
        print(f"megakd {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and leave")] = False,
) -> None:
    """Distil CLIP-style teachers into small students."""


# In the order of --help.
VERBS: tuple[Callable[..., None], ...] = (
    doctor.doctor, data.shapes, runs.evaluate, diagnose.diagnose, data.embed, runs.plan, runs.submit, runs.jobs, runs.smoke,
    study.study, report.report, vqa.answer, export.export,
)  # fmt: skip
for verb in VERBS:
    app.command()(verb)
for verb in (data.check, data.tokenizer):
    helpers.command()(verb)
app.add_typer(helpers, name="data")
sides = (bench.step, bench.loader, bench.teacher_load, bench.teacher_speed, bench.cached, bench.objectives, bench.traffic)
for verb in (*sides, bench.start, bench.growth, bench.share):
    benchmarks.command(verb.__name__.replace("_", "-"))(verb)
benchmarks.command("plan")(bench.plan_check)
app.add_typer(benchmarks, name="bench")


def main() -> int:
    """Run a verb; a user's mistake is one message and exit code 2."""
    try:
        app()
    except ValueError as error:
        from megakd.recipe.credentials import redact  # pydantic's second, which --help does not wait for

        print(f"error: {redact(str(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Exception as error:
        from megakd.runtime import failures  # torch's, which --help does not wait for

        explained = failures.explain(error)
        if explained is None:
            raise
        print(f"error: {explained}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0
