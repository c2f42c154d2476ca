"""`megakd evaluate RUN`: score a run's weights without the run's engine, teacher or training data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megakd.evaluation import benchmark_suite, measured, tables
from megakd.evaluation.benchmark_suite import SuiteChoice
from megakd.evaluation.encoder import Encoder
from megakd.evaluation.sets import sets_of
from megakd.evaluation.suite import Suite, open_sets
from megakd.export import trained
from megakd.recipe import Recipe, texts
from megakd.recipe import load as recipes
from megakd.recipe.best import BOTH, CURRENT, EMA
from megakd.runtime import collectives, launch, run_folder
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller


@dataclass(frozen=True)
class _Scored:
    """A checkpoint with its scores, and what they are of."""

    results: dict[str, Any]
    path: Path
    recipe: Recipe
    student: nn.Module


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
        return _scores(Path(run), checkpoint, overrides, world).results


def evaluate_run(run: Path, chosen: Path | None, overrides: list[str], suite: SuiteChoice | None = None) -> None:
    """`evaluate`, with a suite's scores and the sizes and speeds of student and teachers, written to RUN/evaluation.json and printed."""
    with process_group() as world:
        scored = _scores(run, chosen, overrides, world, suite)
        results, student = scored.results, scored.recipe.student
        name = (None if student is None else student.model) or "own architecture"
        models = {
            "student": measured.of(scored.student, results["images_per_second"], model=name),
            **measured.teachers(scored.recipe, world),
        }
        if world.is_main:
            if not any(override.startswith("evaluation.diagnostics") for override in overrides):
                results |= _diagnostics_of(run, results)
            results["models"] = models
            run_folder.write_json(run / run_folder.EVALUATION, results)
            if scored.recipe.evaluation.vqa:
                bundle, settings = run / run_folder.BUNDLE, run / run_folder.RUN
                print(f"evaluation.vqa: not scored here; megakd evaluate {bundle} --recipe {settings} asks its decoder")
            print(scored.path)
            tables.show(results)
            print(f"written to {run / run_folder.EVALUATION}")


def _diagnostics_of(run: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What training has written of the same step and sets beside its scores: it takes the teacher, which is not loaded here."""
    try:
        earlier = texts.read_json(run / run_folder.EVALUATION, "")
    except ValueError:
        return {}
    same = isinstance(earlier, dict) and all(earlier.get(key) == results[key] for key in ("step", "sets"))
    return {"diagnostics": earlier["diagnostics"]} if same and "diagnostics" in earlier else {}


@contextlib.contextmanager
def process_group() -> Iterator[World]:
    """For a block; of one process where no launcher has started several."""
    try:
        yield launch.start()
    finally:
        launch.stop()


def _scores(run: Path, chosen: str | Path | None, overrides: Sequence[str], world: World, suite: SuiteChoice | None = None) -> _Scored:
    recipe, benchmark = benchmark_suite.chosen(suite, recipe_of(run, overrides), world)
    path = collectives.by_main(lambda: Path(chosen) if chosen else trained.newest(run), world)
    sets = open_sets(recipe, world)
    if not sets:
        raise ValueError(f"{run}: its recipe names no evaluation set; add one with --set evaluation.retrieval.NAME=SHARDS")
    which = recipe.evaluation.weights
    step, encoder = student_of(recipe, path, world, averaged=which == EMA)
    sets.check_tower(encoder.clip)
    scores = Suite(sets, encoder, world, recipe.data.workers, StopPoller(world)).run()
    results = {"step": step, "sets": sets_of(recipe), **({} if which == CURRENT else {"weights": which}), **scores}
    if which == BOTH:
        _, averaged = student_of(recipe, path, world, averaged=True)
        results[EMA] = Suite(sets, averaged, world, recipe.data.workers, StopPoller(world)).run()
    if benchmark is not None:
        results["suite"] = benchmark.scores(results)
    return _Scored(results, path, recipe, encoder.clip)


def recipe_of(run: Path, overrides: Sequence[str]) -> Recipe:
    """A run's recipe with overrides. Raises ValueError as `trained.recipe_of`, and where a set's credentials were left out of run.json."""
    recipe = trained.recipe_of(run, overrides)
    recipes.check_given(recipe.evaluation, str(run / run_folder.RUN), "evaluation.")
    return recipe


def student_of(recipe: Recipe, path: Path, world: World, *, averaged: bool = False) -> tuple[int, Encoder]:
    """The student of a checkpoint, of its averaged weights perhaps, and the steps behind it."""
    student = trained.student_of(recipe, path, averaged=averaged)
    built, tokenize = student.built, student.built.description.tokenize
    encoder = Encoder(built.clip.to(world.device).eval(), built.preprocess, tokenize, world.device, recipe.evaluation.batch)
    return student.step, encoder
