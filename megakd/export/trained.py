"""A run's student from any of its checkpoints, on the CPU, without the run's engine, teacher, data or ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megakd.export import clip_folder
from megakd.models import clip
from megakd.models.clip import ClipModel
from megakd.recipe import Recipe, chain
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint as checkpoints
from megakd.runtime import run_folder


@dataclass(frozen=True)
class Trained:
    """A student in evaluation mode with the steps behind it. weights: all that its checkpoint holds, as it names them: heads as well."""

    step: int
    built: ClipModel
    weights: dict[str, Tensor]


def recipe_of(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A run's recipe with overrides. Raises ValueError where there is no run, and for a run without a student of pairs."""
    if not (run / run_folder.RUN).is_file():
        raise ValueError(f"{run}: no run folder (it has no {run_folder.RUN}); give the --out of a training run, such as runs/smoke")
    recipe, _ = recipes.load(str(run / run_folder.RUN), overrides, to_compare=True)
    if recipe.student is None or not recipe.active():
        raise ValueError(
            f"{run}: a run of answers alone is scored at its end; `megakd answer {run}/bundle` asks its decoder, and "
            f"`megakd export {run} --to llava` writes it for transformers"
        )
    return recipe


def newest(run: Path) -> Path:
    """The newest valid checkpoint. Raises ValueError where there is none."""
    path = checkpoints.latest_valid(run, print)
    if path is not None:
        return path
    if damaged := len(checkpoints.available(run)):
        raise ValueError(f"{run}: its {damaged} checkpoints are damaged; start the run's command again, or give --checkpoint")
    raise ValueError(f"{run}: no checkpoint in it yet; train further, or give --checkpoint")


def student_of(recipe: Recipe, path: Path, *, averaged: bool = False) -> Trained:
    """The student of a checkpoint, of its averaged weights perhaps (optim.ema).

    Raises ValueError for one that is damaged, has no averages, or is of another student than the recipe's.
    """
    student = chain.with_text(recipe)
    assert student is not None
    progress, weights = checkpoints.load_weights(path, averaged=averaged)
    # The weights that the run started from may be gone, and only they tell how images are prepared.
    _, preprocess = clip.configuration(student, "student")
    without_weights = clip.resolve(student.model_copy(update={"pretrained": None}), "student")
    description = dataclasses.replace(without_weights, preprocess=preprocess)
    built = clip.build(description, torch.device("cpu"), load_weights=False)
    _check_fits(path, built.clip, weights)
    clip_folder.load_clip(built.clip, weights)
    built.clip.eval().requires_grad_(False)
    return Trained(progress.step, built, weights)


def _check_fits(path: Path, clip: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises ValueError where a checkpoint is of another student than the recipe's."""
    expected = {name: value.numel() for name, value in clip.state_dict().items()}
    saved = {name: value.numel() for name, value in clip_folder.clip_weights(weights).items()}
    if odd := sorted(name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name)):
        raise ValueError(
            f"{path}: a checkpoint of another student than this run's recipe has: {len(odd)} tensors differ, {odd[0]} among them "
            f"({expected.get(odd[0], 'none')} numbers in the recipe's, {saved.get(odd[0], 'none')} in the checkpoint); "
            "give a checkpoint of this run, and no --set student.*"
        )
