"""`megakd evaluate`: score a run's weights without the run's engine, teacher or training data, or any model without a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megakd.evaluation import report
from megakd.evaluation.encoder import Encoder
from megakd.evaluation.sets import TEXT_SETS, sets_of
from megakd.evaluation.suite import Suite, open_sets
from megakd.export import trained
from megakd.models import clip
from megakd.recipe import Recipe, Student, Teacher, texts
from megakd.recipe import load as recipes
from megakd.runtime import collectives, files, launch, run_folder
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller

# What a model without a run is not scored by, and why.
_OF_OTHERS = (("vqa", "a decoder answers it"), ("diagnostics", "it compares a student with its teacher: megakd diagnose"))


def evaluate(run: str | Path, checkpoint: str | Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The scores of a run's student on the evaluation sets of its recipe, as evaluation.json holds them; nothing is written.

    {"step": optimiser steps, "zero_shot": {set: {"top1", "top5", "images", ...}}, "retrieval": {set: {"image_to_text": {"R@1", "R@5",
    "R@10"}, "text_to_image": {...}, "mean_R@1", ...}}, "hard_negatives": {set: {kind: {"accuracy", "pairs", ...}}}, "parameters": number,
    "images_per_second": number, "sets": checksum of what was scored on}. Scores are fractions of 1.

    checkpoint: its folder; default: the newest valid one. overrides: settings that differ, "evaluation.retrieval.mine=my/*.tar" for one.
    In a program that torchrun started, every rank calls it, takes its share of the images, and gets the same scores.

    Raises ValueError when the run, a checkpoint or an evaluation set is missing or damaged, or more of a set than data.max_bad_fraction.

    >>> scores = megakd.evaluate("runs/mine")
    >>> sorted(scores["retrieval"]["test"]["image_to_text"])
    ['R@1', 'R@10', 'R@5']
    """
    with process_group() as world:
        return _scores(Path(run), checkpoint, overrides, world)[0]


def evaluate_run(run: Path, chosen: Path | None, overrides: list[str]) -> None:
    """`evaluate`, written to RUN/evaluation.json and printed."""
    with process_group() as world:
        results, path = _scores(run, chosen, overrides, world)
        if world.is_main:
            if not any(override.startswith("evaluation.diagnostics") for override in overrides):
                results |= _diagnostics_of(run, results)
            run_folder.write_json(run / run_folder.EVALUATION, results)
            print(f"{path}\n{report.lines(results)}\nwritten to {run / run_folder.EVALUATION}")


def _diagnostics_of(run: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What training has written of the same step and sets beside its scores: it takes the teacher, which is not loaded here."""
    try:
        earlier = texts.read_json(run / run_folder.EVALUATION, "")
    except ValueError:
        return {}
    same = isinstance(earlier, dict) and all(earlier.get(key) == results[key] for key in ("step", "sets"))
    return {"diagnostics": earlier["diagnostics"]} if same and "diagnostics" in earlier else {}


def evaluate_model(
    settings: Teacher | Student, recipe: str | None, overrides: Sequence[str] = (), out: Path | None = None
) -> dict[str, Any]:
    """The scores of any model that a teacher or a student may be, without a run, printed and written to `out`; as `evaluate` gives them,
    with "model" and "pretrained" in the place of "step".

    recipe: whose evaluation, data and seed count; None: `overrides` say all. Random weights are drawn by the seed. A model of images alone
    is scored by what reads its images alone.

    Raises ValueError when the model cannot be built, when a set is missing or damaged, and for a set of texts and a model without them.
    """
    scored = recipes.load_scored(recipe, overrides)
    name = settings.model or "own architecture"
    with process_group() as world:
        if out is not None:
            collectives.by_main(lambda: _check_file(out), world)
        try:
            description = clip.resolve(settings, "teacher" if isinstance(settings, Teacher) else "student")
        except ValueError as error:
            raise ValueError(f"--model {name}: {error}") from error
        of_texts = [f"evaluation.{kind}.{one}" for kind in TEXT_SETS for one in getattr(scored.evaluation, kind)]
        if of_texts and not description.has_text:
            raise ValueError(f"{', '.join(of_texts)}: --model {name} has no text tower; take out what texts are compared with")
        of_others: dict[str, Any] = {kind: {} for kind, _ in _OF_OTHERS}
        sets = open_sets(scored.model_copy(update={"evaluation": scored.evaluation.model_copy(update=of_others)}), world)
        if not sets:
            raise ValueError("no evaluation set: name some with --set evaluation.retrieval.NAME=SHARDS, or by the --recipe that has them")
        sets.check_tower(clip.on_meta(description).clip)
        for kind, why in _OF_OTHERS:
            if getattr(scored.evaluation, kind) and world.is_main:
                print(f"evaluation.{kind}: not scored, {why}")
        torch.manual_seed(scored.seed)
        built = clip.build(description, torch.device("cpu"))
        tower = built.clip.to(world.device).eval().requires_grad_(False)
        encoder = Encoder(tower, built.preprocess, description.tokenize, world.device, scored.evaluation.batch)
        scores = Suite(sets, encoder, world, scored.data.workers, StopPoller(world)).run()
        results = {"model": name, "pretrained": settings.pretrained, "sets": sets_of(scored), **scores}
        if world.is_main:
            print(report.lines(results))
            if out is not None:
                run_folder.write_json(out, results)
                print(f"written to {out}")
    return results


def _check_file(path: Path) -> None:
    """Raises ValueError where a file of scores cannot be written."""
    if path.is_dir():
        raise ValueError(f"--out {path}: a folder; give the file that the scores are written to, as {path / run_folder.EVALUATION}")
    files.check_place(path.absolute().parent, "--out")


@contextlib.contextmanager
def process_group() -> Iterator[World]:
    """For a block; of one process where no launcher has started several."""
    try:
        yield launch.start()
    finally:
        launch.stop()


def _scores(run: Path, chosen: str | Path | None, overrides: Sequence[str], world: World) -> tuple[dict[str, Any], Path]:
    """The scores, and the checkpoint that they belong to."""
    recipe = recipe_of(run, overrides)
    path = collectives.by_main(lambda: Path(chosen) if chosen else trained.newest(run), world)
    sets = open_sets(recipe, world)
    if not sets:
        raise ValueError(f"{run}: its recipe names no evaluation set; add one with --set evaluation.retrieval.NAME=SHARDS")
    step, encoder = student_of(recipe, path, world)
    sets.check_tower(encoder.clip)
    scores = Suite(sets, encoder, world, recipe.data.workers, StopPoller(world)).run()
    return {"step": step, "sets": sets_of(recipe), **scores}, path


def recipe_of(run: Path, overrides: Sequence[str]) -> Recipe:
    """A run's recipe with overrides. Raises ValueError as `trained.recipe_of`, and where a set's credentials were left out of run.json."""
    recipe = trained.recipe_of(run, overrides)
    recipes.check_given(recipe.evaluation, str(run / run_folder.RUN), "evaluation.")
    return recipe


def student_of(recipe: Recipe, path: Path, world: World) -> tuple[int, Encoder]:
    """The student of a checkpoint, and the steps behind it."""
    student = trained.student_of(recipe, path)
    built, tokenize = student.built, student.built.description.tokenize
    encoder = Encoder(built.clip.to(world.device).eval(), built.preprocess, tokenize, world.device, recipe.evaluation.batch)
    return student.step, encoder
