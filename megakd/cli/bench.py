"""`megakd bench`: side by side with the field's own tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megakd.cli.options import Batch, Json, Rounds, Steps, Threads, Workers


def step(
    rounds: Rounds = 5,
    batch: Batch = 32,
    steps: Steps = 6,
    workers: Workers = 1,
    threads: Threads = 1,
    rows: Annotated[list[str] | None, typer.Option(help="float32, int8, store or compiled; repeatable; default: all")] = None,
    json: Json = None,
) -> None:
    """Processor and wall time of a step against open_clip's own distillation loop, on the same shards and models.

    Our teacher is in float32, in 8 bit with the agreement of its embeddings beside, or a store; compiled towers go against plain ones.
    """
    from megakd.benchmarks import step as benchmark

    benchmark.run(rounds, batch, steps, workers, threads, json, rows)


def loader(
    rounds: Rounds = 5,
    workers: Workers = 2,
    batch: Annotated[int, typer.Option(min=1, help="samples a batch")] = 64,
    batches: Annotated[int, typer.Option(min=1, help="timed batches a round, rounded up to whole turns of the workers")] = 32,
    sources: Annotated[
        str, typer.Option(help="pictures: set (256 px and more, synthetic), or photographs of 256, 512, 1024 px; with commas")
    ] = "set,256,512,1024",
    json: Json = None,
) -> None:
    """Samples/s of the training loader against open_clip's webdataset loader, on the same shards."""
    from megakd.benchmarks import loader as benchmark

    benchmark.run(rounds, workers, batch, batches, sources, json)


def teacher_load(
    model: Annotated[str, typer.Option(help="open_clip name; random weights of full size are written and deleted")] = "ViT-bigG-14",
    mode: Annotated[str, typer.Option(help="teacher.mode")] = "zero3_int8",
    ranks: Annotated[int, typer.Option(min=1, help="processes")] = 2,
    threads: Threads = 1,
    folder: Annotated[Path | None, typer.Option(help="where the weights go for a while; default: the system's temporary folder")] = None,
    json: Json = None,
) -> None:
    """Seconds and peak memory a rank of loading a full-size teacher and embedding two pairs."""
    from megakd.benchmarks import teacher_load as benchmark

    benchmark.run(model, mode, ranks, threads=threads, folder=folder, file=json)


def teacher_speed(
    model: Annotated[str, typer.Option(help="open_clip name; only its image tower runs, with random weights")] = "ViT-bigG-14",
    batch: Annotated[int, typer.Option(min=1, help="images a forward")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="how often each way to multiply takes its turn")] = 9,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="give activations outliers, as trained giants have, and measure the remedies too")
    ] = False,
    json: Json = None,
) -> None:
    """Images/s and weight memory of a teacher in int8, by each way to multiply, against 16 bit (on a CPU float32)."""
    from megakd.benchmarks import teacher_speed as benchmark
    from megakd.runtime.console import quiet_libraries

    quiet_libraries()
    benchmark.run(model, batch, rounds, json, outliers=outliers)


def cached(
    rounds: Rounds = 3,
    batch: Batch = 16,
    steps: Steps = 4,
    workers: Workers = 1,
    threads: Threads = 1,
    json: Json = None,
) -> None:
    """Training images/s from a store of embeddings against the live teacher, which costs ten times the student."""
    from megakd.benchmarks import cached as benchmark

    benchmark.run(rounds, batch, steps, workers, threads, json)


def objectives(
    pairs: Annotated[list[int] | None, typer.Option(min=2, help="pairs of a batch; repeatable; default: 1024 and 8192")] = None,
    rounds: Rounds = 3,
    only: Annotated[list[str] | None, typer.Option(help="an objective; repeatable; default: all")] = None,
    json: Json = None,
) -> None:
    """Milliseconds and memory of each objective, by the ways to compute it, beside open_clip's distillation loss."""
    from megakd.benchmarks import objectives as benchmark

    benchmark.run(pairs or [1024, 8192], rounds, only or [], json)


def start(
    rounds: Rounds = 5,
    shards: Annotated[list[int] | None, typer.Option(min=1, help="shards of a set; repeatable; default: 1, 10, 100, 1000, 10000")] = None,
    json: Json = None,
) -> None:
    """Processor seconds of a dry run of smoke beside its libraries' imports, and of reading a set's indexes at a resume."""
    from megakd.benchmarks import start as benchmark

    benchmark.run(rounds, shards or [1, 10, 100, 1000, 10000], json)


def plan_check(json: Json = None) -> None:
    """What `megakd plan` predicts against what runs on this machine take."""
    from megakd.benchmarks import plan_check as benchmark

    benchmark.run(json)


def traffic(
    ranks: Annotated[list[int] | None, typer.Option(min=2, help="of the cases to run, 2 or 4; repeatable; default: both")] = None,
    json: Json = None,
) -> None:
    """What `megakd plan` says of traffic against DeepSpeed's comms logger and every collective of real runs on this machine."""
    from megakd.benchmarks import traffic as benchmark

    benchmark.run(ranks or [2, 4], json)


def growth(
    axis: Annotated[list[str] | None, typer.Option(help="shards, questions, ranks or batch; repeatable; default: all")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="runs of each point")] = 2,
    threads: Threads = 1,
    out: Annotated[Path | None, typer.Option(help="folder for growth.csv, growth.svg and growth.png")] = None,
    json: Json = None,
) -> None:
    """How a step's processor time grows with shards, questions, ranks and batch, and a start's time and memory with the first two."""
    from megakd.benchmarks import growth as benchmark

    benchmark.run(axis or [], rounds, threads, out, json)


def share(
    rounds: Rounds = 3,
    batch: Annotated[int, typer.Option(min=4, help="pairs a step, of both ranks")] = 2048,
    steps: Steps = 5,
    micro_batch: Annotated[int, typer.Option("--micro_batch", min=1, help="pairs of a rank that go through the student at once")] = 64,
    workers: Workers = 1,
    threads: Threads = 1,
    student: Annotated[str | None, typer.Option(help="open_clip name; default: 12 layers of width 192, 224 px, 32-pixel patches")] = None,
    json: Json = None,
) -> None:
    """The share of a step outside the towers: two ranks, a teacher from a store."""
    from megakd.benchmarks import share as benchmark

    benchmark.run(rounds, batch, steps, micro_batch, workers, threads, student, json)
