"""`megakd evaluate BUNDLE`: a decoder by the questions that it answers, its tower by everything else."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megakd.evaluation import benchmark_suite, measured
from megakd.evaluation.benchmark_suite import SuiteChoice
from megakd.evaluation.encoder import Encoder
from megakd.evaluation.of_model import check_file, tell
from megakd.evaluation.run import process_group
from megakd.evaluation.sets import sets_of
from megakd.evaluation.suite import Suite, open_sets
from megakd.export.bundle import Bundle, resolve_bundle
from megakd.models import clip
from megakd.models.casts import pixel_dtype
from megakd.recipe import load as recipes
from megakd.recipe.schema import Scored
from megakd.runtime import collectives, precision
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.vqa import check, evaluate
from megakd.vqa.loader import ImageProcessor


def evaluate_bundle(
    folder: Path, recipe: str | None, overrides: Sequence[str] = (), out: Path | None = None, suite: SuiteChoice | None = None
) -> dict[str, Any]:
    """The scores of a decoder's bundle, printed and written to `out`: "vqa" by its answers, the rest by its vision tower; as `run.evaluate`
    gives them, with "bundle" in the place of "step", and "models", their sizes.

    With `out` the answers are kept in the folder OUT without its suffix, as a run keeps them, and an interrupted evaluation goes on.

    Raises ValueError for no bundle or a damaged one, for sets that are missing or damaged, for questions that do not fit the decoder, and
    for sets of images and a decoder without a vision tower.
    """
    scored = recipes.load_scored(recipe, overrides)
    with process_group() as world:
        if out is not None:
            collectives.by_main(lambda: check_file(out), world)
        scored, benchmark = benchmark_suite.chosen(suite, scored, world)
        spec = resolve_bundle(folder)
        if scored.evaluation.diagnostics and world.is_main:
            print("evaluation.diagnostics: not scored, it compares a student with its teacher: megakd diagnose")
        wanted = scored.model_copy(update={"evaluation": scored.evaluation.model_copy(update={"diagnostics": {}})})
        questions = evaluate.open_sets(wanted, world, sees=spec.tower is not None)
        sets = open_sets(wanted, world)
        if not questions and not sets:
            raise ValueError(
                f"{folder}: no evaluation set; name some with --set evaluation.vqa.NAME={{ ... }}, or by a --recipe that has them"
            )
        if sets and spec.tower is None:
            raise ValueError(f"{folder}: this decoder has no vision tower, and evaluation sets of images are scored by one; take them out")
        if sets and spec.tower is not None:
            sets.check_tower(clip.on_meta(spec.tower).clip)
        where = world.device
        bundle = Bundle.build(spec, where, precision.dtype(precision.of(where)))
        notes = collectives.by_main(lambda: _tried(questions, bundle, scored), world)
        if world.is_main and notes:
            print("\n".join(notes))
        results: dict[str, Any] = {"bundle": str(folder), "sets": sets_of(scored)}
        interruptions, models = StopPoller(world), dict[str, Any]()
        if bundle.towers is not None and spec.tower is not None:
            encoder = Encoder(bundle.towers.clip, bundle.towers.preprocess, spec.tower.tokenize, where, scored.evaluation.batch)
            results |= Suite(sets, encoder, world, scored.data.workers, interruptions).run() if sets else {}
            speed = results.get("images_per_second")
            models["tower"] = measured.of(bundle.towers.clip, speed, model=spec.tower.settings.model or "own architecture")
        if questions:
            answerer = _answerer(bundle, scored, world, {"bundle": spec.sha256})
            with _answers_folder(out, world) as answers:
                results["vqa"] = evaluate.evaluate(questions, answerer, world, answers, scored.data, interruptions)
        models["decoder"] = measured.of(bundle.decoder.language, None, model=spec.decoder.settings.model or "own architecture")
        results["models"] = models
        if benchmark is not None:
            results["suite"] = benchmark.scores(results)
        tell(results, out, world)
    return results


def _tried(questions: dict[str, evaluate.Opened], bundle: Bundle, scored: Scored) -> list[str]:
    """What the user should know of the questions' lengths. Raises ValueError for sets of which too much does not fit."""
    notes = []
    for name, opened in questions.items():
        key = f"evaluation.vqa.{name}"
        found = check.try_prompts(opened.questions, bundle.prompts, bundle.towers is not None, key, scored.data.max_bad_fraction)
        notes += found.sentences(key, learned=False)
    return notes


def _answerer(bundle: Bundle, scored: Scored, world: World, fingerprint: dict[str, Any]) -> evaluate.Answerer:
    look: Callable[[Tensor], Tensor] | None = None
    images, dtype = None, precision.dtype(precision.of(world.device))
    if bundle.towers is not None:
        look = bundle.see
        images = ImageProcessor(bundle.towers.preprocess, scored.data, bundle.decoder.settings.image_fit)
        dtype = pixel_dtype(bundle.towers.clip.visual)  # type: ignore[arg-type]
    settings = scored.evaluation
    return evaluate.Answerer(
        bundle.decoder, look, bundle.prompts, images, world.device, dtype, settings.vqa_batch, settings.answer_tokens, fingerprint
    )


@contextlib.contextmanager
def _answers_folder(out: Path | None, world: World) -> Iterator[Path]:
    """Beside `out`, or one that is gone afterwards."""
    if out is not None:
        folder = out.with_suffix("")
        yield folder if folder != out else out.with_name(f"{out.name}_answers")
        return
    with tempfile.TemporaryDirectory() as own:
        yield Path(str(collectives.share(own, world)))
        collectives.barrier(world)
