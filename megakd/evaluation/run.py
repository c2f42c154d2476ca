"""`megakd evaluate RUN`: score a run's weights without the run's engine, teacher or training data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from megakd.evaluation import report
from megakd.evaluation.encoder import Encoder
from megakd.evaluation.sets import sets_of
from megakd.evaluation.suite import Suite, open_sets
from megakd.export import clip_folder
from megakd.models import clip
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint, collectives, launch, run_folder
from megakd.runtime.preemption import StopPoller


def evaluate_run(run: Path, chosen: Path | None, overrides: list[str]) -> None:
    """Write RUN/evaluation.json and print it. Raises ValueError when the run, a checkpoint or an evaluation set is missing."""
    if not (run / run_folder.RUN).is_file():
        raise ValueError(f"{run}: no run folder (it has no {run_folder.RUN}); give the --out of a training run, such as runs/smoke")
    recipe, _ = recipes.load(str(run / run_folder.RUN), overrides, to_compare=True)
    recipes.check_given(recipe.evaluation, str(run / run_folder.RUN), "evaluation.")
    world = launch.start()
    try:
        if recipe.student is None or not recipe.objectives.active():
            raise ValueError(f"{run}: a run of answers alone is scored at its end; `megakd answer {run}/bundle` asks its decoder")
        path = collectives.by_main(lambda: chosen or _newest(run), world)
        sets = open_sets(recipe, world)
        if not sets:
            raise ValueError(f"{run}: its recipe names no evaluation set; add one with --set evaluation.retrieval.NAME=SHARDS")
        progress, weights = checkpoint.load_weights(path)
        # The weights that the run started from may be gone; how their images were prepared still holds.
        _, preprocess = clip.configuration(recipe.student, "student")
        described = clip.resolve(recipe.student.model_copy(update={"pretrained": None}), "student")
        description = dataclasses.replace(described, preprocess=preprocess)
        built = clip.build(description, torch.device("cpu"), load_weights=False)
        _check_fits(path, built.clip, weights)
        clip_folder.load_clip(built.clip, weights)
        encoder = Encoder(built.clip.to(world.device).eval(), built.preprocess, description.tokenize, world.device, recipe.evaluation.batch)
        results = {
            "step": progress.step,
            "sets": sets_of(recipe),
            **Suite(sets, encoder, world, recipe.data.workers, StopPoller(world)).run(),
        }
        if world.is_main:
            run_folder.write_json(run / run_folder.EVALUATION, results)
            print(f"{path}\n{report.lines(results)}\nwritten to {run / run_folder.EVALUATION}")
    finally:
        launch.stop()


def _newest(run: Path) -> Path:
    """The newest sound checkpoint. Raises ValueError where there is none."""
    path = checkpoint.latest_valid(run, print)
    if path is not None:
        return path
    if damaged := len(checkpoint.available(run)):
        raise ValueError(f"{run}: its {damaged} checkpoints are damaged; start the run's command again, or give --checkpoint")
    raise ValueError(f"{run}: no checkpoint in it yet; train further, or give --checkpoint")


def _check_fits(path: Path, clip: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Raises ValueError where a checkpoint is of another student than the recipe's."""
    expected = {name: value.numel() for name, value in clip.state_dict().items()}
    found = {name: value.numel() for name, value in clip_folder.clip_weights(weights).items()}
    if odd := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise ValueError(
            f"{path}: a checkpoint of another student than this run's recipe has: {len(odd)} tensors differ, {odd[0]} among them "
            f"({expected.get(odd[0], 'none')} numbers in the recipe's, {found.get(odd[0], 'none')} in the checkpoint); "
            "give a checkpoint of this run, and no --set student.*"
        )
