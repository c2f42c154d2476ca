"""Visual question answering: every question of a set is put to a decoder once, over all ranks, and the answers are scored.

1. `open_sets` opens what the recipe names under evaluation.vqa.
2. `evaluate` asks what has no answer yet: the questions are split over the ranks, each appends its answers to a file of its own.
3. Rank 0 scores by the benchmark's rules and writes vqa.json, all answers, and the file that the benchmark's server takes.

Answers are greedy: in float32 they do not depend on ranks, workers, batch size or an interruption, as a batch's padding changes logits by
rounding alone. In bf16 that may turn over an answer whose two best tokens are nearly equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from megakd.data.bad_samples import BadCounter, BadSample, Reason, located
from megakd.data.transforms import normalise, rgb_image
from megakd.recipe import Data, QuestionSource, Recipe
from megakd.recipe.schema import Scored
from megakd.runtime import collectives, run_folder, watchdog
from megakd.runtime.console import with_progress
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.vqa.answers_log import AnswersLog, GivenAnswer
from megakd.vqa.benchmarks import benchmark
from megakd.vqa.benchmarks.base import Answered
from megakd.vqa.loader import ImageProcessor, PromptBatch, evaluation_questions, rank_slice
from megakd.vqa.prompts import PromptEncoder
from megakd.vqa.sets import CaptionSet, QuestionSet, open_questions

# Legend: B questions, L tokens of a prompt, V patches of the tower, C its width.
RESULTS, ANSWERS = "vqa.json", "answers"
_TRIED = 16  # questions of a set at the start, until an image can be read


class GreedyDecoder(Protocol):
    """Generates B lists of token ids greedily from left-padded prompts, each independent of the rest of its batch."""

    def generate(
        self, visual_tokens_BVC: Tensor | None, ids_BL: Tensor, attend_BL: Tensor, image_mask_BL: Tensor, max_new_tokens: int
    ) -> list[list[int]]: ...


@dataclass(frozen=True)
class Answerer:
    """A decoder with whole weights on this rank, in evaluation mode, and what turns questions into its answers.

    look: normalised pixels (B, 3, H, W) -> (B, V, C); None, with image_processor None, for a decoder that is shown no images.
    fingerprint: of weights and preprocessing, plain JSON; answers of another fingerprint are asked anew.
    """

    decoder: GreedyDecoder
    look: Callable[[Tensor], Tensor] | None
    encoder: PromptEncoder
    image_processor: ImageProcessor | None
    device: torch.device
    dtype: torch.dtype
    batch: int
    max_new_tokens: int
    fingerprint: Mapping[str, Any]

    def answers(self, prompts: PromptBatch) -> list[str]:
        """One answer a row."""
        watchdog.beat("evaluating")
        if not len(prompts):
            return []
        here, visual_tokens_BVC = prompts.to(self.device, non_blocking=True), None
        with torch.inference_mode():
            if self.look is not None:
                assert self.image_processor is not None, "a decoder that is shown images needs the tower's preprocessing"
                assert here.pixels is not None
                visual_tokens_BVC = self.look(normalise(here.pixels, self.image_processor.preprocess, self.dtype))
            tokens = self.decoder.generate(visual_tokens_BVC, here.ids_BL, here.attend_BL, here.image_mask_BL, self.max_new_tokens)
        return [str(self.encoder.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in tokens]


@dataclass(frozen=True)
class Opened:
    """A set of the recipe: its source and its questions."""

    source: QuestionSource
    questions: QuestionSet


def open_sets(recipe: Recipe | Scored, world: World, *, sees: bool) -> dict[str, Opened]:
    """Every set under evaluation.vqa. sees: whether the decoder is shown images, of which one of each set is then read.

    Raises ValueError with the key for one that is missing, damaged, or has no questions.
    """
    sets: dict[str, Opened] = {}
    for name, source in recipe.evaluation.vqa.items():
        key = f"evaluation.vqa.{name}"
        if source.format == "captions":
            raise ValueError(f"{key}.format = 'captions': captions are no answers; name them under evaluation.retrieval")
        opened = open_questions(source, key, recipe.data, world.rank, world.size, lambda: collectives.barrier(world))
        assert not isinstance(opened, CaptionSet)
        if sees and opened.images is not None:
            collectives.by_main(partial(try_images, opened, key, recipe.data), world)
        sets[name] = Opened(source, opened)
    return sets


def try_images(questions: QuestionSet, key: str, data: Data) -> None:
    """Read questions' images up to the first that can be read, on rank 0. Raises ValueError when the others are too much of the set."""
    bad = BadCounter(seen=len(questions))
    for index in range(min(len(questions), _TRIED)):
        (item,) = questions.read([index], True)
        try:
            if isinstance(item, BadSample):
                raise item
            if item.image is not None:
                with located(item.where):
                    rgb_image(item.image, data)
        except BadSample as error:
            bad.add(error.reason, str(error))
            continue
        break
    bad.check(data.max_bad_fraction, at_least=1, what="questions", key=key)


def evaluate(
    sets: Mapping[str, Opened], answerer: Answerer, world: World, folder: Path, data: Data, interruptions: StopPoller
) -> dict[str, Any]:
    """{set: scores and where its files are}, the same on every rank; all of them call it. Rank 0 writes FOLDER/vqa.json.

    FOLDER/answers/SET.jsonl holds each answer as it was given; SET.submission.json or .jsonl is for the benchmark's server. After an
    interruption answered questions are not asked again, on any number of ranks, unless model, set, prompt or length of answers differ.

    Raises on every rank ValueError, with the answers kept, when more than data.max_bad_fraction of a set's questions could not be asked,
    and when the decoder's logits are NaN; Interrupted when a signal comes.
    """
    results = {name: _evaluate_one(name, opened, answerer, world, folder, data, interruptions) for name, opened in sets.items()}
    collectives.by_main(lambda: run_folder.write_json(folder / RESULTS, {"model": dict(answerer.fingerprint), "sets": results}), world)
    return results


def _evaluate_one(
    name: str, opened: Opened, answerer: Answerer, world: World, folder: Path, data: Data, interruptions: StopPoller
) -> dict[str, Any]:
    questions = opened.questions
    ids = [questions[index].question_id for index in range(len(questions))]
    journal = AnswersLog(folder / ANSWERS, name, _fingerprint(opened, answerer), ids)
    # what could not be asked is tried again, as its image may have been repaired
    known = {index: row for index, row in collectives.by_main(journal.open, world).items() if row.unusable is None}
    missing = [index for index in range(len(questions)) if index not in known]
    rows = known | _gathered(_ask(questions, missing, journal, answerer, world, data.workers, interruptions), world)
    return collectives.by_main(lambda: _finish(name, opened, journal, rows, folder, data.max_bad_fraction), world)


def _finish(
    name: str, opened: Opened, journal: AnswersLog, rows: dict[int, GivenAnswer], folder: Path, max_bad_fraction: float
) -> dict[str, Any]:
    journal.close(rows)
    bad = BadCounter(seen=len(rows))
    for row in rows.values():
        if row.unusable is not None:
            reason, _, where = row.unusable.partition(": ")
            bad.add(cast("Reason", reason), where)
    try:
        bad.check(max_bad_fraction, at_least=1, what="questions", key=f"evaluation.vqa.{name}")
    except ValueError as error:
        raise ValueError(f"{error}; answers are kept, and the same command asks the others again") from error
    questions, of_format = opened.questions, benchmark(opened.source.format)
    answered = [Answered(questions[index], rows[index].answer, rows[index].unusable is None) for index in range(len(questions))]
    submission = of_format.write_submission(answered, folder / ANSWERS, name)
    return {
        "format": of_format.name,
        **of_format.results(answered),
        "unusable": bad.total,
        "submission": None if submission is None else f"{ANSWERS}/{submission.name}",
    }


def _ask(
    questions: QuestionSet,
    missing: list[int],
    journal: AnswersLog,
    answerer: Answerer,
    world: World,
    workers: int,
    interruptions: StopPoller,
) -> dict[int, GivenAnswer]:
    """This rank's part of the questions without an answer; each batch's answers are written at once."""
    mine = [missing[place] for place in rank_slice(len(missing), world.rank, world.size)]
    batches = evaluation_questions(
        questions,
        mine,
        answerer.encoder,
        answerer.image_processor,
        batch=answerer.batch,
        workers=workers,
        pin_memory=world.device.type == "cuda",
    )
    rows: dict[int, GivenAnswer] = {}
    with journal.appending(world.rank) as append:
        answered = ((batch, answerer.answers(batch)) for batch in batches)  # lazily: `between` raises one rank's error on all
        between, count = interruptions.between(answered, len(missing), answerer.batch), -(-len(mine) // answerer.batch)
        for batch, answers in with_progress(between, "evaluating questions", "batches", count):
            given = {int(index): GivenAnswer(answer) for index, answer in zip(batch.index, answers, strict=True)}
            given |= {index: GivenAnswer("", why) for index, why in batch.unusable}
            append(given)
            rows |= given
    return rows


def _gathered(rows: dict[int, GivenAnswer], world: World) -> dict[int, GivenAnswer]:
    """Every rank's rows on rank 0; nothing elsewhere."""
    if world.size == 1:
        return rows
    parts: list[Any] | None = [None] * world.size if world.is_main else None
    torch.distributed.gather_object(rows, parts)
    return {index: row for part in parts or [] for index, row in part.items()}


def _fingerprint(opened: Opened, answerer: Answerer) -> dict[str, Any]:
    """What an answer depends on, which is neither the batch nor the ranks."""
    prompts = answerer.encoder
    return {
        "model": dict(answerer.fingerprint),
        "questions": opened.questions.signature,
        "format": opened.source.format,
        "prompt": [prompts.written, prompts.settings.instruction, prompts.image_tokens, prompts.max_length],
        "sees": answerer.image_processor is not None and opened.questions.images is not None,
        "image_fit": prompts.settings.image_fit,
        "max_new_tokens": answerer.max_new_tokens,
        "dtype": str(answerer.dtype),
    }


def lines(results: Mapping[str, Any]) -> str:
    """For people: a line for each set, and one of its families."""
    rows = []
    for name, scores in results.items():
        scored = "not scored" if scores["accuracy"] is None else f"{scores['accuracy']:.1%}"
        lost = f", {scores['unusable']} could not be asked" if scores["unusable"] else ""
        rows.append(f"  vqa {name}: {scored} of {scores['questions']} questions ({scores['metric']}){lost}")
        families = scores.get("by_family", {})
        if len(families) > 1:
            rows.append("    " + ", ".join(f"{family} {part['accuracy']:.1%}" for family, part in families.items()))
    return "\n".join(rows)
