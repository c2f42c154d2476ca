"""`megakd evaluate --model`: any model that a teacher or a student may be, without a run, also in 8 bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megakd.evaluation import benchmark_suite, measured, tables
from megakd.evaluation.benchmark_suite import SuiteChoice
from megakd.evaluation.encoder import Encoder
from megakd.evaluation.run import process_group
from megakd.evaluation.sets import TEXT_SETS, sets_of
from megakd.evaluation.suite import Suite, open_sets
from megakd.models import clip, streaming
from megakd.models.clip import ClipModel, parameters_in
from megakd.models.int8 import matmul
from megakd.recipe import Student, Teacher
from megakd.recipe import load as recipes
from megakd.runtime import collectives, files, precision, run_folder
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller

# What a model without a run is not scored by, and why.
OF_OTHERS = (("vqa", "a decoder answers it"), ("diagnostics", "it compares a student with its teacher: megakd diagnose"))


def evaluate_model(
    settings: Teacher | Student,
    recipe: str | None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    suite: SuiteChoice | None = None,
) -> dict[str, Any]:
    """The scores of any model that a teacher or a student may be, without a run, printed and written to `out`; as `run.evaluate` gives
    them, with "model" and "pretrained" in the place of "step", and "models", its size and speed.

    recipe: whose evaluation, data and seed count; None: `overrides` say all. A teacher's mode says whether it is in 8 bit. Random weights
    are drawn by the seed. A model of images alone is scored by what reads its images alone.

    Raises ValueError when the model cannot be built, when a set is missing or damaged, and for a set of texts and a model without them.
    """
    scored = recipes.load_scored(recipe, overrides)
    name = settings.model or "own architecture"
    with process_group() as world:
        if out is not None:
            collectives.by_main(lambda: check_file(out), world)
        scored, benchmark = benchmark_suite.chosen(suite, scored, world)
        try:
            description = clip.resolve(settings, "teacher" if isinstance(settings, Teacher) else "student")
        except ValueError as error:
            raise ValueError(f"--model {name}: {error}") from error
        of_texts = [f"evaluation.{kind}.{one}" for kind in TEXT_SETS for one in getattr(scored.evaluation, kind)]
        if of_texts and not description.has_text:
            raise ValueError(f"{', '.join(of_texts)}: --model {name} has no text tower; take out what texts are compared with")
        of_others: dict[str, Any] = {kind: {} for kind, _ in OF_OTHERS}
        sets = open_sets(scored.model_copy(update={"evaluation": scored.evaluation.model_copy(update=of_others)}), world)
        if not sets:
            raise ValueError("no evaluation set: name some with --set evaluation.retrieval.NAME=SHARDS, or by the --recipe that has them")
        outline = clip.on_meta(description).clip
        sets.check_tower(outline)
        for kind, why in OF_OTHERS:
            if getattr(scored.evaluation, kind) and world.is_main:
                print(f"evaluation.{kind}: not scored, {why}")
        torch.manual_seed(scored.seed)
        built = _built(description, world)
        encoder = Encoder(built.clip, built.preprocess, description.tokenize, world.device, scored.evaluation.batch)
        scores = Suite(sets, encoder, world, scored.data.workers, StopPoller(world)).run()
        scores["parameters"] = parameters_in(outline)
        size = measured.of(built.clip, scores["images_per_second"], model=name, parameters=scores["parameters"])
        results = {"model": name, "pretrained": settings.pretrained, "sets": sets_of(scored), **scores, "models": {"model": size}}
        if settings.image_size is not None:
            results["image_size"] = list(settings.image_size)
        if isinstance(settings, Teacher) and settings.int8:
            results["precision"] = "int8"
        if benchmark is not None:
            results["suite"] = benchmark.scores(scores)
        tell(results, out, world)
    return results


def _built(description: clip.ModelSpec, world: World) -> ClipModel:
    """With its weights on the device, in float32; a teacher in 8 bit as `replicated_int8` holds it."""
    settings = description.settings
    if not (isinstance(settings, Teacher) and settings.int8):
        built = clip.build(description, torch.device("cpu"))
        built.clip.to(world.device).eval().requires_grad_(False)
        return built
    product = matmul.resolved(settings.int8_product, world.device)
    built = streaming.load(description, world, precision.of(world.device), int8=streaming.Int8(settings.outlier_threshold, product))
    assert built.originals is not None, "an int8 model was read from weights"
    built.originals.close()
    return built


def tell(results: dict[str, Any], out: Path | None, world: World) -> None:
    """Print the results as tables, and write them to `out`; the first rank alone."""
    if not world.is_main:
        return
    tables.show(results)
    if out is not None:
        run_folder.write_json(out, results)
        print(f"written to {out}")


def check_file(path: Path) -> None:
    """Raises ValueError where a file of scores cannot be written."""
    if path.is_dir():
        raise ValueError(f"--out {path}: a folder; give the file that the scores are written to, as {path / run_folder.EVALUATION}")
    files.check_place(path.absolute().parent, "--out")
