"""Verbs that make data: a procedural world, a tokenizer, a store of a teacher's embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megakd.cli.options import Overrides, from_fields
from megakd.runtime.exits import EXIT_UNFIT
from megakd.teachers.embed_request import EmbedRequest


def shapes(
    out: Annotated[Path, typer.Argument(help="folder to write; an equal set that is there already is kept")],
    train: Annotated[int, typer.Option(help="clean image-text pairs to train on, and as many noisy ones")] = 20000,
    test: Annotated[int, typer.Option(help="pairs for retrieval and hard negatives")] = 2000,
    seed: Annotated[int, typer.Option(help="another seed is another world of the same kind")] = 0,
    caption_noise: Annotated[
        float, typer.Option("--caption_noise", help="fraction of wrong captions in train_noisy/, as on the web; 0 leaves that split out")
    ] = 0.5,
    hard: Annotated[
        int,
        typer.Option(
            help="pairs of train_hard/, groups of four that differ by one word; a recipe keeps them with data.block = 4, data.window = 1"
        ),
    ] = 0,
    image_size: Annotated[
        int | None, typer.Option("--image_size", help="pixels a side; default: 36, twelve for each of 3 x 3 cells")
    ] = None,
) -> None:
    """Write the procedural image-text set as tar shards."""
    from megakd.data.shapes import IMAGE_SIZE, write_world

    world = write_world(out, train=train, test=test, seed=seed, caption_noise=caption_noise, hard=hard, image_size=image_size or IMAGE_SIZE)
    done = f"written in {world.seconds:.1f} s" if world.written else "there already"
    training = f"{world.train} clean and {world.train_noisy} noisy training pairs" + (
        f", {world.train_hard} in hard groups" if world.train_hard else ""
    )
    print(f"{out}: {training}, {world.test} test pairs, {world.zeroshot} zero-shot images, {done}")


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


def check(
    shards: Annotated[list[str] | None, typer.Argument(help="image-text shards, as data.train names them; default: the recipe's")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="name of a shipped recipe or a .toml file: its [data], its student's tokenizer, what it reads")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one setting, e.g. data.caption=alt")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for check.html, with a contact sheet, and check.json")] = None,
    samples: Annotated[int | None, typer.Option(help="read so many, evenly spaced; default: all")] = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object; its keys: megakd/data/README.md")] = False,
) -> None:
    """What is in shards, and what training would drop of it and why: sizes, captions, repeats, a contact sheet.

    Exit code 0 where a run would train on them, 1 where it would refuse, 2 where they cannot be opened.
    """
    from megakd.data.check import run
    from megakd.runtime.console import quiet_libraries
    from megakd.training import checked_data

    quiet_libraries()
    request = checked_data.request(shards or [], recipe, overrides or [], samples, out)
    if not run.check(request, as_json=json):
        raise typer.Exit(EXIT_UNFIT)


@from_fields
def embed(
    recipe: Annotated[str, typer.Option(help="name of a shipped recipe or a .toml file: its data, views, seed and teacher")],
    request: EmbedRequest,
    check: Annotated[bool, typer.Option("--check", help="recompute a random sample of the store that is there, and compare")] = False,
    overrides: Overrides = None,
) -> None:
    """Write a recipe's teacher embeddings to a store that training reads instead of running the teacher (teacher.store)."""
    from megakd.runtime.console import quiet_libraries
    from megakd.teachers import embed

    quiet_libraries()
    embed.run(recipe, request, check=check, overrides=overrides or [])
