"""What `megakd export` is given, found and loaded: a run's checkpoint, a decoder's bundle, a folder of open_clip, or a named model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megakd.export import trained
from megakd.export.bundle import resolve_bundle
from megakd.export.manifest import MANIFEST
from megakd.models import clip
from megakd.models.clip import ClipModel
from megakd.models.pretrained import LOCAL
from megakd.recipe import Model, Recipe
from megakd.recipe.best import EMA
from megakd.recipe.chain import CLIP_CONFIG
from megakd.runtime import run_folder


@dataclass(frozen=True)
class Source:
    """One model on the CPU, in float32 and evaluation mode. name: for people, where it is from.

    weights: as `clip_folder.write_model` takes them: towers under "clip.", a run's heads under "heads.". run, recipe, step: of a run.
    bundle: the folder of a decoder, whose vision tower `built` is then.
    """

    name: str
    built: ClipModel
    weights: dict[str, Tensor]
    run: Path | None = None
    recipe: Recipe | None = None
    step: int | None = None
    assumed: list[str] = field(default_factory=list)
    bundle: Path | None = None


def of_run(run: Path, chosen: Path | None) -> Source:
    """The student of a run's checkpoint, the newest valid one unless another is chosen. Raises ValueError as `trained` does."""
    recipe = trained.recipe_of(run)
    path = chosen or trained.newest(run)
    averaged = recipe.export.weights == EMA
    student = trained.student_of(recipe, path, averaged=averaged)
    of = ", averaged weights (ema)" if averaged else ""
    return Source(f"{path}, step {student.step}{of}", student.built, student.weights, run, recipe, student.step)


def of_settings(settings: Model, named: str) -> Source:
    """A model that a teacher or a student may be. named: the option that names it, for messages. Raises ValueError naming it."""
    try:
        description = clip.resolve(settings, "teacher" if not named.startswith(LOCAL) else "student")
        built = clip.build(description, torch.device("cpu"))
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from error
    built.clip.eval().requires_grad_(False)
    weights = {f"clip.{name}": value for name, value in built.clip.state_dict().items()}
    assumed = ["its weights are random: nothing was loaded"] if settings.pretrained == clip.RANDOM else []
    return Source(f"{settings.model} {settings.pretrained or ''}".strip(), built, weights, assumed=assumed)


def of_bundle(folder: Path, chosen: Path | None) -> Source:
    """The decoder of a bundle's folder, or of a run that has one. Raises ValueError where there is none, or it reads no vision tower."""
    where = folder if (folder / MANIFEST).is_file() else folder / run_folder.BUNDLE
    if not (where / MANIFEST).is_file():
        raise ValueError(f"{folder}: no decoder's bundle in it ({MANIFEST}, or {run_folder.BUNDLE}/{MANIFEST} as a run writes at its end)")
    if chosen is not None:
        raise ValueError(f"--checkpoint {chosen}: a decoder is exported from {where}, which its run wrote at its end; take it out")
    tower = resolve_bundle(where).tower
    if tower is None:
        raise ValueError(f"{where}: its decoder has no vision tower, and the format is of models that see; it is a language model alone")
    built = clip.build(tower, torch.device("cpu"))
    built.clip.eval().requires_grad_(False)
    return Source(str(where), built, {f"clip.{name}": value for name, value in built.clip.state_dict().items()}, bundle=where)


def of_folder(folder: Path, chosen: Path | None) -> Source:
    """What a folder holds. Raises ValueError naming it where it is none that can be exported."""
    if (folder / run_folder.RUN).is_file():
        return of_run(folder, chosen)
    if chosen is not None:
        raise ValueError(f"--checkpoint {chosen}: is of a run, and {folder} is none (it has no {run_folder.RUN}); take it out")
    if (folder / CLIP_CONFIG).is_file():
        return of_settings(Model(model=f"{LOCAL}{folder}"), f"{LOCAL}{folder}")
    if (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: a decoder's bundle, whose format is --to llava; its vision tower alone is {folder}/tower, if inside")
    raise ValueError(
        f"{folder}: neither a run (it has no {run_folder.RUN}), a model of open_clip ({CLIP_CONFIG}) nor a decoder's bundle ({MANIFEST}); "
        f"give one, or a model with --model and --pretrained"
    )
