"""`megakd <verb>`: everything beside training itself. Each verb imports what it needs when it is called, so that --help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megakd import __version__
from megakd.recipe.credentials import redact
from megakd.runtime.exits import EXIT_USER_ERROR

app = typer.Typer(
    epilog="Training is a program of its own: deepspeed megakd/train.py --recipe NAME; its flags: python megakd/train.py --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Side-by-side benchmarks against the field's own tools.", no_args_is_help=True)
app.add_typer(bench, name="bench")


def _version(asked: bool) -> None:
    if asked:
        print(f"megakd {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and leave")] = False,
) -> None:
    """Distil CLIP-style teachers into small students."""


@app.command()
def shapes(
    out: Annotated[Path, typer.Argument(help="folder to write; an equal set that is there already is kept")],
    train: Annotated[int, typer.Option(help="clean image-text pairs to train on, and as many noisy ones")] = 20000,
    test: Annotated[int, typer.Option(help="pairs for retrieval and hard negatives")] = 2000,
    seed: Annotated[int, typer.Option(help="another seed is another world of the same kind")] = 0,
    caption_noise: Annotated[
        float, typer.Option("--caption_noise", help="fraction of wrong captions in train_noisy/, as on the web; 0 leaves that split out")
    ] = 0.5,
    image_size: Annotated[
        int | None, typer.Option("--image_size", help="pixels a side; default: 36, twelve for each of 3 x 3 cells")
    ] = None,
) -> None:
    """Write the procedural image-text set as tar shards."""
    from megakd.data.shapes import IMAGE_SIZE, write_world

    world = write_world(out, train=train, test=test, seed=seed, caption_noise=caption_noise, image_size=image_size or IMAGE_SIZE)
    done = f"written in {world.seconds:.1f} s" if world.written else "there already"
    training = f"{world.train} clean and {world.train_noisy} noisy training pairs"
    print(f"{out}: {training}, {world.test} test pairs, {world.zeroshot} zero-shot images, {done}")


@app.command()
def tokenizer(
    texts: Annotated[list[str], typer.Argument(help=".txt files with a text a line, or image-text shards (.tar), whose captions are read")],
    out: Annotated[Path, typer.Option(help="folder to write, which student.tokenizer takes")],
    kind: Annotated[
        str, typer.Option(help="bpe: parts of words, over bytes, so that nothing is unknown; words: whole words alone")
    ] = "bpe",
    words: Annotated[int, typer.Option(help="most of them, special tokens included")] = 8192,
    context: Annotated[int, typer.Option(help="tokens of the longest text, as text_cfg.context_length")] = 77,
) -> None:
    """Make a tokenizer for the words of your own captions."""
    from megakd.data import own_tokenizer

    if kind not in ("bpe", "words"):
        raise ValueError(f"--kind {kind}: bpe or words")
    size = own_tokenizer.write(texts, out, kind, words, context)  # type: ignore[arg-type]
    print(
        f"{out}: {size} words. In the recipe: student.tokenizer = '{out}', text_cfg = {{ vocab_size = {size}, context_length = {context} }}"
    )


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder; its recipe says on which sets")],
    checkpoint: Annotated[Path | None, typer.Option(help="a checkpoint's folder; default: the newest valid one of the run")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a setting, e.g. evaluation.retrieval.mine=my/*.tar")
    ] = None,
) -> None:
    """Score a run's student on the recipe's evaluation sets and write RUN/evaluation.json. Starts under torchrun as well."""
    from megakd.evaluation import run as evaluation_run
    from megakd.runtime.console import quiet_libraries

    quiet_libraries()
    evaluation_run.evaluate_run(run, checkpoint, overrides or [])


@app.command()
def embed(
    recipe: Annotated[str, typer.Option(help="name of a shipped recipe or a .toml file: its data, views, seed and teacher")],
    out: Annotated[Path, typer.Option(help="folder of the store; what an interrupted job left there is kept")],
    views: Annotated[int, typer.Option(help="augmented views of each image; epoch e of a training reads view e mod VIEWS")] = 1,
    check: Annotated[bool, typer.Option("--check", help="recompute a random sample of the store that is there, and compare")] = False,
    dtype: Annotated[str, typer.Option(help="bf16, or fp32 for twice the size")] = "bf16",
    ds_config: Annotated[str | None, typer.Option("--ds_config", metavar="JSON", help="its micro-batch is embedded at once")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one setting of the recipe")] = None,
) -> None:
    """Write a recipe's teacher embeddings to a store that training reads instead of running the teacher (teacher.store)."""
    from megakd.runtime.console import quiet_libraries
    from megakd.teachers import embed

    quiet_libraries()
    if dtype not in ("bf16", "fp32"):
        raise ValueError(f"--dtype {dtype}: bf16 or fp32")
    embed.run(recipe, views, out, check=check, config=ds_config, overrides=overrides or [], dtype=dtype)  # type: ignore[arg-type]


@app.command()
def plan(
    recipe: Annotated[str, typer.Option(help="name of a shipped recipe or a .toml file")],
    gpus: Annotated[int, typer.Option(help="ranks of the job")],
    gpu_memory: Annotated[float, typer.Option("--gpu_memory", help="GB of one GPU")],
    ds_config: Annotated[str | None, typer.Option("--ds_config", metavar="JSON", help="DeepSpeed configuration of the student")] = None,
    gpus_per_node: Annotated[int, typer.Option("--gpus_per_node", help="GPUs that share fast links")] = 8,
    gpu: Annotated[str, typer.Option(help="whose speeds the times assume: a100, h100, h200, b200, cpu")] = "h100",
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one setting of the recipe")] = None,
    json: Annotated[Path | None, typer.Option(help="write the plan to this file as well")] = None,
) -> None:
    """What a job will need, before it queues: memory, traffic, FLOPs and time for each way to hold the teacher, and which ways fit."""
    from megakd.planning import plan as planner
    from megakd.recipe import load as recipes

    loaded, name = recipes.load(recipe, overrides or [])
    planner.run(loaded, name, ds_config, planner.Cluster(gpus, gpu_memory, gpus_per_node, gpu), file=json)


@app.command()
def submit(
    recipe: Annotated[str, typer.Option(help="name of a shipped recipe or a .toml file")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one setting of the recipe")] = None,
    ds_config: Annotated[str | None, typer.Option("--ds_config", metavar="JSON", help="DeepSpeed configuration")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder, on a file system that all nodes share; default: runs/NAME")] = None,
    resume: Annotated[str, typer.Option(help="auto, none, or a checkpoint's folder, as for training")] = "auto",
    array: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="a run for each value, in a folder of its own; repeated, for each combination"),
    ] = None,
    cluster: Annotated[str, typer.Option(help="slurm; local: processes on this machine; debug: in this process")] = "slurm",
    nodes: Annotated[int, typer.Option(min=1, help="machines")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus_per_node", min=0, help="GPUs of each, one rank a GPU; 0 trains on the CPU")
    ] = None,
    tasks_per_node: Annotated[int | None, typer.Option("--tasks_per_node", min=1, help="ranks of each; default: its GPUs, or 1")] = None,
    cpus_per_task: Annotated[int | None, typer.Option("--cpus_per_task", min=1, help="CPUs a rank")] = None,
    mem: Annotated[str | None, typer.Option(help="memory a node, e.g. 480G")] = None,
    partition: Annotated[str | None, typer.Option(help="as sbatch's")] = None,
    constraint: Annotated[str | None, typer.Option(help="as sbatch's")] = None,
    account: Annotated[str | None, typer.Option(help="as sbatch's")] = None,
    qos: Annotated[str | None, typer.Option(help="as sbatch's")] = None,
    time: Annotated[str, typer.Option(help="limit of one stretch, in minutes or as sbatch's; the job is requeued after it")] = "24:00:00",
    signal_delay: Annotated[int, typer.Option("--signal_delay", min=1, help="seconds before the limit to save at")] = 180,
    container_image: Annotated[str | None, typer.Option("--container_image", help="for srun with pyxis")] = None,
    container_mounts: Annotated[
        str | None, typer.Option("--container_mounts", help="beside the current folder and the run's: SOURCE:TARGET,...")
    ] = None,
    setup: Annotated[list[str] | None, typer.Option(metavar="LINE", help="line of the batch script before srun; repeatable")] = None,
    python: Annotated[str | None, typer.Option(help="interpreter on the nodes; default: this one, in a container `python`")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="until the run ends; exit with its code")] = False,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="check, print the batch file that would be sent, and submit nothing")] = False,
) -> None:
    """Submit a training run to SLURM. It saves and goes back into the queue at preemptions and time limits."""
    from megakd.jobs import submit
    from megakd.runtime.console import quiet_libraries

    quiet_libraries()
    if cluster not in ("slurm", "local", "debug"):
        raise ValueError(f"--cluster {cluster}: slurm, local or debug")
    wanted = submit.Resources(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        time=time,
        signal_delay=signal_delay,
        cpus_per_task=cpus_per_task,
        mem=mem,
        partition=partition,
        constraint=constraint,
        account=account,
        qos=qos,
        container_image=container_image,
        container_mounts=container_mounts,
        setup=tuple(setup or ()),
        python=python,
    )
    top, runs = submit.requests(recipe, overrides or [], ds_config, out, resume, array or [])
    sys.exit(submit.run(top, runs, wanted, cluster, follow=wait, dry_run=dry_run))  # type: ignore[arg-type]


@app.command()
def jobs(
    folder: Annotated[Path, typer.Argument(help="where the run folders are, at any depth")] = Path("runs"),
    watch: Annotated[float | None, typer.Option(metavar="SECONDS", help="print the table again and again, at least 15 s apart")] = None,
) -> None:
    """List runs: job, state, step, images/s, last loss, where the log is."""
    from megakd.jobs import status

    status.show(folder, watch)


@app.command()
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
    """The main job on this machine: train a tiny teacher, distil it, train the same student without it, compare.

    With --vqa, a tiny decoder that can read is adapted to each of four towers (random, without KD, with KD, the teacher's) and to none,
    and its answers are compared. Two CPU cores took ten minutes for --seeds 3, and eight for --vqa with one seed.
    """
    from megakd.study import smoke as images_and_texts
    from megakd.study import smoke_vqa as questions

    if vqa:
        sys.exit(questions.run(seeds, out or Path("runs/smoke_vqa"), data or Path("data/shapes_vqa")))
    sys.exit(images_and_texts.run(seeds, out or Path("runs/smoke_comparison"), data or Path("data/shapes")))


@app.command()
def answer(
    bundle: Annotated[Path, typer.Argument(help="RUN/bundle of a run that trained a decoder")],
    image: Annotated[str | None, typer.Argument(help="image file; none: a question about no image")] = None,
    question: Annotated[str | None, typer.Argument(help="in quotes")] = None,
    merge: Annotated[Path | None, typer.Option(metavar="OUT", help="write the bundle to OUT, its adapter merged, and ask nothing")] = None,
) -> None:
    """Answer a question about an image, or about none: megakd answer RUN/bundle image.jpg "How many red squares?"."""
    from megakd.cli import vqa
    from megakd.export import bundle as bundles
    from megakd.runtime.console import quiet_libraries

    quiet_libraries()
    if merge is not None:
        bundles.merge(bundle, merge)
        print(f"{merge}: {bundle} with its adapter merged")
    elif image is None or (question is None and vqa.is_file(image)):
        raise ValueError("give an image and a question: megakd answer RUN/bundle image.jpg 'How many red squares?'")
    elif question is None:
        vqa.run(bundle, None, image)  # the only argument is what is asked
    else:
        vqa.run(bundle, Path(image), question)


@bench.command()
def step(
    rounds: Annotated[int, typer.Option(min=1, help="how often the two alternate")] = 5,
    batch: Annotated[int, typer.Option(min=2, help="pairs a step")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="timed steps a round")] = 6,
    workers: Annotated[int, typer.Option(min=1, help="decoding processes of each")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="OpenMP threads of each")] = 1,
    json: Annotated[Path | None, typer.Option(help="write the result to this file as well")] = None,
) -> None:
    """Training images/s against open_clip's own distillation loop, on the same shards and models."""
    from megakd.benchmarks import step as benchmark

    benchmark.run(rounds, batch, steps, workers, threads, json)


@bench.command()
def loader(
    rounds: Annotated[int, typer.Option(min=1, help="how often the two alternate")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="decoding processes of each")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="samples a batch")] = 64,
    batches: Annotated[int, typer.Option(min=1, help="timed batches a round, rounded up to whole turns of the workers")] = 32,
    json: Annotated[Path | None, typer.Option(help="write the result to this file as well")] = None,
) -> None:
    """Samples/s of the training loader against open_clip's webdataset loader, on the same shards."""
    from megakd.benchmarks import loader as benchmark

    benchmark.run(rounds, workers, batch, batches, json)


@bench.command("teacher-load")
def teacher_load(
    model: Annotated[str, typer.Option(help="open_clip name; random weights of full size are written and deleted")] = "ViT-bigG-14",
    mode: Annotated[str, typer.Option(help="teacher.mode")] = "zero3_int8",
    ranks: Annotated[int, typer.Option(min=1, help="processes")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="OpenMP threads of each")] = 1,
    folder: Annotated[Path | None, typer.Option(help="where the weights go for a while; default: the system's temporary folder")] = None,
    json: Annotated[Path | None, typer.Option(help="write the result to this file as well")] = None,
) -> None:
    """Seconds and peak memory a rank of loading a full-size teacher and embedding two pairs."""
    from megakd.benchmarks import teacher_load as benchmark

    benchmark.run(model, mode, ranks, threads=threads, folder=folder, file=json)


@bench.command("teacher-speed")
def teacher_speed(
    model: Annotated[str, typer.Option(help="open_clip name; only its image tower runs, with random weights")] = "ViT-bigG-14",
    batch: Annotated[int, typer.Option(min=1, help="images a forward")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="how often each way to multiply takes its turn")] = 9,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="give activations outliers, as trained giants have, and measure the remedies too")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="write the result to this file as well")] = None,
) -> None:
    """Images/s and weight memory of a teacher in int8, by each way to multiply, against 16 bit (on a CPU float32)."""
    from megakd.benchmarks import teacher_speed as benchmark
    from megakd.runtime.console import quiet_libraries

    quiet_libraries()
    benchmark.run(model, batch, rounds, json, outliers=outliers)


@bench.command()
def cached(
    rounds: Annotated[int, typer.Option(min=1, help="how often the two alternate")] = 3,
    batch: Annotated[int, typer.Option(min=2, help="pairs a step")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="timed steps a round")] = 4,
    workers: Annotated[int, typer.Option(min=1, help="decoding processes of each")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="OpenMP threads of each")] = 1,
    json: Annotated[Path | None, typer.Option(help="write the result to this file as well")] = None,
) -> None:
    """Training images/s from a store of embeddings against the live teacher, which costs ten times the student."""
    from megakd.benchmarks import cached as benchmark

    benchmark.run(rounds, batch, steps, workers, threads, json)


@bench.command("plan")
def plan_check(json: Annotated[Path | None, typer.Option(help="write the result to this file as well")] = None) -> None:
    """What `megakd plan` predicts against what runs on this machine take."""
    from megakd.benchmarks import plan_check as benchmark

    benchmark.run(json)


def main() -> int:
    """Run a verb; a user's mistake is one message and exit code 2."""
    try:
        app()
    except ValueError as error:
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
