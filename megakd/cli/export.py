"""`megakd export`: a trained student, or any model, in the formats that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megakd.cli.options import from_fields
from megakd.export.options import Options


@from_fields
def export(
    where: Annotated[Path | None, typer.Argument(metavar="RUN", help="a run, a folder that open_clip loads, or a bundle (llava)")] = None,
    *,
    to: Annotated[str, typer.Option(help="the format: open_clip, transformers, onnx, llava")],
    out: Annotated[Path, typer.Option(help="folder that is written, in the place of an earlier export")],
    checkpoint: Annotated[Path | None, typer.Option(help="a checkpoint's folder; default: the newest valid one of the run")] = None,
    model: Annotated[str | None, typer.Option(help="in place of RUN: a model as teacher.model names it, e.g. ViT-B-32, timm:NAME")] = None,
    pretrained: Annotated[str | None, typer.Option(help="its weights, as teacher.pretrained: a tag, a file, random")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="its tokenizer, as teacher.tokenizer; default: the model's own")] = None,
    preprocess: Annotated[str | None, typer.Option(metavar="TAG", help="the tag whose preprocessing the weights of a file take")] = None,
    options: Options,
) -> None:
    """Write a model in a format that other programs load, after that format's own library has loaded it and gave the same embeddings.

    On one CPU, from a checkpoint of any ZeRO stage and number of ranks, without the run's data or teacher.
    """
    of_models = {"--pretrained": pretrained, "--tokenizer": tokenizer, "--preprocess": preprocess}
    if (where is None) == (model is None):
        raise ValueError("give either a run's folder, or a model with --model and --pretrained, not both and not neither")
    if where is not None and (given := [flag for flag, value in of_models.items() if value is not None]):
        raise ValueError(f"{given[0]}: goes with --model; {where} says its own")
    if model is not None and checkpoint is not None:
        raise ValueError("--checkpoint: is of a run; give the weights of --model with --pretrained")
    from transformers.utils import logging

    from megakd.export import command, source
    from megakd.recipe import Teacher
    from megakd.runtime.console import quiet_libraries

    quiet_libraries()
    logging.disable_progress_bar()
    command.check(to, options)
    command.check_out(out)
    if command.FORMATS[to].of_bundles:
        if where is None:
            raise ValueError(f"--model {model}: --to {to} is of decoders; give the folder of a bundle, or of a run that has one")
        found = source.of_bundle(where, checkpoint)
    elif where is not None:
        found = source.of_folder(where, checkpoint)
    else:
        named = Teacher(model=model, pretrained=pretrained, tokenizer=tokenizer, preprocess=preprocess)
        found = source.of_settings(named, f"--model {model}")
    for line in (found.name, *found.assumed):  # before what may take minutes
        print(line, flush=True)
    for line in (*command.export(found, to, out, options), f"written to {out}"):
        print(line)
    for line in command.push(out, options):
        print(line)
