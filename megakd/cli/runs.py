"""Verbs around runs: what one will need, submitting and listing them, scoring them, the smoke jobs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from megakd.cli.options import Overrides, Recipe, from_fields
from megakd.jobs.resources import Resources
from megakd.planning.cluster import Cluster
from megakd.planning.scaling import Scaling


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="run folder, whose recipe says on which sets; or a decoder's bundle, RUN/bundle")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="a checkpoint's folder; default: the newest valid one of the run")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a setting, e.g. evaluation.retrieval.mine=my/*.tar")
    ] = None,
    model: Annotated[str | None, typer.Option(help="in place of RUN: a model as teacher.model names it, e.g. ViT-B-32, timm:NAME")] = None,
    pretrained: Annotated[str | None, typer.Option(help="its weights, as teacher.pretrained: a tag, a file, random")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="its tokenizer, as teacher.tokenizer; default: the model's own")] = None,
    preprocess: Annotated[str | None, typer.Option(metavar="TAG", help="the tag whose preprocessing the weights of a file take")] = None,
    image_size: Annotated[
        int | None, typer.Option("--image_size", min=1, help="pixels a side that it sees, as teacher.image_size; default: the model's own")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, or int8 as a teacher of mode replicated_int8; default: fp32")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="with --model or a bundle: a recipe, or run.json, with the sets; default: --set's alone")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="JSON", help="with --model or a bundle: write the scores to this file as well")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="a list of sets to score on as well, with averages: datacomp38, or a .toml file")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="with --suite: the folder of its sets, wds_NAME/test/*.tar")] = None,
) -> None:
    """Score a run's student on the recipe's evaluation sets and write RUN/evaluation.json, a decoder's bundle by its answers, or with
    --model any model without a run.

    Starts under torchrun as well.
    """
    of_models = {
        **{"--pretrained": pretrained, "--tokenizer": tokenizer, "--preprocess": preprocess},
        **{"--image_size": image_size, "--precision": precision},
    }
    of_others = {"--recipe": recipe, "--out": out}
    if (run is None) == (model is None):
        raise ValueError("give either a run folder, or a model with --model and --pretrained, not both and not neither")
    is_bundle = run is not None and (run / "bundle.json").is_file()
    if run is not None and (given := [flag for flag, value in of_models.items() if value is not None]):
        whose = "bundle" if is_bundle else "run"
        raise ValueError(f"{given[0]}: goes with --model; a {whose} has a model of its own")
    if run is not None and not is_bundle and (given := [flag for flag, value in of_others.items() if value is not None]):
        raise ValueError(f"{given[0]}: goes with --model or a bundle; a run has sets of its own, and {run}/evaluation.json for its scores")
    if (model is not None or is_bundle) and checkpoint is not None:
        raise ValueError("--checkpoint: is of a run; give the weights of --model with --pretrained")
    if precision not in (None, "fp32", "int8"):
        raise ValueError(f"--precision {precision}: fp32 or int8")
    if data is not None and suite is None:
        raise ValueError("--data: goes with --suite, whose sets are in it; sets of a recipe have paths of their own")
    from megakd.evaluation.benchmark_suite import SuiteChoice
    from megakd.runtime.console import quiet_libraries

    quiet_libraries()
    chosen = None if suite is None else SuiteChoice(suite, data)
    if run is not None and is_bundle:
        from megakd.evaluation.of_bundle import evaluate_bundle

        evaluate_bundle(run, recipe, overrides or [], out, chosen)
    elif run is not None:
        from megakd.evaluation.run import evaluate_run

        evaluate_run(run, checkpoint, overrides or [], chosen)
    else:
        from megakd.evaluation.of_model import evaluate_model
        from megakd.recipe import Teacher

        mode = "replicated_int8" if precision == "int8" else "replicated"
        size = None if image_size is None else (image_size, image_size)
        settings = Teacher(model=model, pretrained=pretrained, tokenizer=tokenizer, preprocess=preprocess, image_size=size, mode=mode)
        evaluate_model(settings, recipe, overrides or [], out, chosen)


@from_fields
def plan(
    recipe: Recipe,
    cluster: Cluster,
    assumed: Scaling,
    ds_config: Annotated[str | None, typer.Option("--ds_config", metavar="JSON", help="DeepSpeed configuration of the student")] = None,
    overrides: Overrides = None,
    json: Annotated[Path | None, typer.Option(help="write the plan to this file as well")] = None,
) -> None:
    """What a job will need, before it queues: memory, traffic, FLOPs and time for each way to hold the teacher, and which ways fit; with
    --sweep, how they change with the number of GPUs.
    """
    counts = assumed.check(cluster)
    from megakd.planning import plan as planner
    from megakd.planning import report, sweep, sweep_report
    from megakd.recipe import load as recipes

    loaded, name = recipes.load(recipe, overrides or [])
    if counts:
        sweep_report.show(sweep.sweep(loaded, name, ds_config, cluster, assumed), json)
    else:
        report.show(planner.plan(loaded, name, ds_config, cluster), json)


@from_fields
def submit(
    recipe: Recipe,
    *,
    overrides: Overrides = None,
    ds_config: Annotated[str | None, typer.Option("--ds_config", metavar="JSON", help="DeepSpeed configuration")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder, on a file system that all nodes share; default: runs/NAME")] = None,
    resume: Annotated[str, typer.Option(help="auto, none, or a checkpoint's folder, as for training")] = "auto",
    array: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="a run for each value, in a folder of its own; repeated, for each combination"),
    ] = None,
    cluster: Annotated[str, typer.Option(help="slurm; local: processes on this machine; debug: in this process")] = "slurm",
    wanted: Resources,
    wait: Annotated[bool, typer.Option("--wait", help="until the run ends; exit with its code")] = False,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="check, print the batch file that would be sent, and submit nothing")] = False,
) -> None:
    """Submit a training run to SLURM. It saves and goes back into the queue at preemptions and time limits."""
    from megakd.jobs import submit
    from megakd.runtime.console import quiet_libraries

    quiet_libraries()
    if cluster not in ("slurm", "local", "debug"):
        raise ValueError(f"--cluster {cluster}: slurm, local or debug")
    top, runs = submit.requests(recipe, overrides or [], ds_config, out, resume, array or [])
    sys.exit(submit.run(top, runs, wanted, cluster, follow=wait, dry_run=dry_run))  # type: ignore[arg-type]


def jobs(
    folder: Annotated[Path, typer.Argument(help="where the run folders are, at any depth")] = Path("runs"),
    watch: Annotated[float | None, typer.Option(metavar="SECONDS", help="print the table again and again, at least 15 s apart")] = None,
) -> None:
    """List runs: job, state, step, images/s, last loss, where the log is."""
    from megakd.jobs import status

    status.show(folder, watch)


def smoke(
    seeds: Annotated[int, typer.Option(min=1, help="repeat the two students with so many seeds")] = 1,
    out: Annotated[Path | None, typer.Option(help="folder for the runs; default: runs/smoke_comparison or runs/smoke_vqa")] = None,
    data: Annotated[
        Path | None, typer.Option(help="folder of the shapes world; written when it is not there; default: data/shapes or data/shapes_vqa")
    ] = None,
    vqa: Annotated[
        bool,
        typer.Option("--vqa", help="judge the vision towers by what a small decoder answers about images"),
    ] = False,
) -> None:
    """The main job on this machine: train a tiny teacher, distil it, train the same student without it, compare. Killed, the same command
    goes on.

    With --vqa, a tiny decoder that can read is adapted to each of four towers (random, without KD, with KD, the teacher's) and to none,
    and its answers are compared. Both are shipped studies, smoke_comparison and smoke_vqa, whose page is --out/report.html. Two CPU cores
    took ten minutes for --seeds 3, and as many for --vqa with one seed.
    """
    from megakd.runtime.console import quiet_libraries
    from megakd.study import launcher, run
    from megakd.study.report import terminal

    quiet_libraries()
    study = "smoke_vqa" if vqa else "smoke_comparison"
    folder = out or Path("runs") / study
    command = shlex.join(["megakd", *sys.argv[1:]])
    if code := run.run(study, folder, launcher.ranks_here(), seeds=range(seeds), data=data, command=command):
        sys.exit(code)
    terminal.conclude(folder)
