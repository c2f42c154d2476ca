"""A megakd bundle as a model of lmms-eval: greedy answers, one image a question, the harness's own prompts in the bundle's template.

Answers are those of megakd's own evaluation; scores differ where the rules do: lmms-eval processes unanimous answers too, counts POPE's
"Yes." as wrong and takes the yes-ratio from the labels (see `vqa/benchmarks/pope.py`). Its prompts end with the instruction of the task's
YAML; the bundle was trained with `decoder.instruction`, and the two should be alike.
Source: lmms_eval/api/model.py and api/task.py of lmms-eval 0.7.3
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from lmms_eval.api.instance import GenerationResult  # type: ignore[import-not-found]
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from PIL import Image

from megakd.data.bad_samples import BadSample
from megakd.export.bundle import Bundle
from megakd.vqa.benchmarks.base import Question
from megakd.vqa.prompts import Encoded, stack

log = logging.getLogger("megakd.evaluation")
_LONGEST = 16  # tokens of an answer where a task does not say: VQAv2's own setting in lmms-eval


class _Query(NamedTuple):
    """An image and a question. where: task and number, for messages."""

    image: Image.Image | None
    text: str
    where: str


class MegakdBundle(lmms):  # type: ignore[misc]
    """`--model megakd --model_args bundle=FOLDER`; more processes by `accelerate launch`, each with the whole bundle."""

    is_simple = True

    def __init__(self, bundle: str, batch_size: int | str = 1, device: str | None = None, max_batch_size: int | None = None) -> None:
        """Raises ValueError for a folder that is no whole bundle, and for an automatic batch size."""
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"--batch_size {batch_size}: megakd takes a number of questions")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device is not None and self._world_size == 1 else self.accelerator.device
        self.batch_size = min(int(batch_size), max_batch_size or int(batch_size))
        self._bundle = Bundle.load(Path(bundle), self.device)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer for each request, in order."""
        answers: list[str] = []
        for batch in self._batches(requests):
            settings = batch[0].args[1]
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            for answer in self._answer([self._query(*request.args[:6]) for request in batch], _length(settings)):
                for stop in filter(None, stops):
                    answer = answer.split(stop)[0]
                answers.append(answer.strip())
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """(loss, greedy) for each request: mean -log p of the continuation's tokens and the end; whether it is the greedy answer.

        What does not fit the decoder's context has an infinite loss and is not greedy. It is the loss, not the likelihood: lmms-eval's
        multiple choice takes the smallest. Each pair is wrapped in a GenerationResult, because evaluator.py of 0.7.3 turns everything
        else into text, pairs included, and then cannot unpack them.
        """
        results: list[Any] = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            queries = [self._query(*request.args[:6]) for request in batch]
            continuations = [self._continuation(*request.args[1:6]) for request in batch]
            losses = self._losses(queries, continuations)
            answers = self._answer(queries, max(count for _, count in losses))
            for (loss, count), answer, continuation in zip(losses, answers, continuations, strict=True):
                results.append(GenerationResult(text=(loss, count > 0 and answer == continuation)))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Raises ValueError: a bundle answers single questions, and the rounds of such a task depend on each other."""
        tasks = sorted({str(request.args[-2]) for request in requests})
        raise ValueError(f"{', '.join(tasks)}: asks in several rounds, and a megakd bundle answers one question at a time: leave it out")

    def _answer(self, queries: Sequence[_Query], longest: int) -> list[str]:
        """A question that does not fit the decoder's context is answered with "", as in megakd's own evaluation."""
        fits = [longest > 0 and self._encoded(query, None) is not None for query in queries]
        kept = list(itertools.compress(queries, fits))
        answers = iter(self._bundle.answer([query.image for query in kept], [query.text for query in kept], longest))
        return [next(answers) if fit else "" for fit in fits]

    def _encoded(self, query: _Query, answer: str | None) -> Encoded | None:
        """The question, with the answer if one is given, as ids. None, with a line in the log, where it is longer than the context."""
        prompts, sees = self._bundle.prompts, query.image is not None and self._bundle.towers is not None
        try:
            if answer is None:
                return prompts.prompt(query.text, False, sees)
            return prompts.training(Question(query.where, None, query.text, (answer,), answer, ""), sees)
        except BadSample as bad:
            log.warning("not asked: %s, %r: %s", query.where, query.text[:80], bad)
            return None

    @torch.no_grad()
    def _losses(self, queries: Sequence[_Query], answers: Sequence[str]) -> list[tuple[float, int]]:
        """The mean -log p of each answer's tokens, and how many there are; (infinity, 0) where it does not fit."""
        encoded = [self._encoded(query, answer) for query, answer in zip(queries, answers, strict=True)]
        fits = [one is not None for one in encoded]
        if not any(fits):
            return [(math.inf, 0)] * len(queries)
        bundle = self._bundle
        batch = stack([one for one in encoded if one is not None], bundle.prompts.padding, left=False)
        visual_BVC = bundle.look([query.image for query in itertools.compress(queries, fits)])
        outputs = bundle.decoder(visual_BVC, *(tensor.to(self.device) for tensor in batch))
        tokens_B = outputs["answer_tokens"]
        losses = zip((outputs["answer_nll"] / tokens_B).tolist(), map(int, tokens_B.tolist()), strict=True)
        return [next(losses) if fit else (math.inf, 0) for fit in fits]

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[Any]]:
        """At most batch_size neighbours with the same settings."""
        for _, alike in itertools.groupby(requests, lambda request: json.dumps(request.args[1], sort_keys=True, default=str)):
            while batch := list(itertools.islice(alike, self.batch_size)):
                yield batch

    def _query(self, text: str, _: Any, visuals_of: Callable[[Any], list[Any] | None] | None, number: int, task: str, split: str) -> _Query:
        visuals = (visuals_of(self.task_dict[task][split][number]) or []) if visuals_of is not None else []
        if len(visuals) > 1 or not all(isinstance(visual, Image.Image) for visual in visuals):
            kinds = ", ".join(type(visual).__name__ for visual in visuals)
            raise ValueError(f"{task}: question {number} shows {len(visuals)} things ({kinds}): a megakd bundle takes one image, or none")
        return _Query(visuals[0].convert("RGB") if visuals else None, text, f"{task}: question {number}")

    def _continuation(self, target: Any, _: Any, number: int, task: str, split: str) -> str:
        return str(target(self.task_dict[task][split][number]) if callable(target) else target).strip()


def _length(settings: dict[str, Any]) -> int:
    sampled = settings.get("do_sample")
    if sampled is None:  # where it is false, as in mmvet, the temperature does not matter
        sampled = settings.get("temperature")
    if sampled or (settings.get("num_beams") or 1) > 1:
        raise ValueError(f"generation_kwargs = {settings}: megakd answers greedily; set do_sample false, temperature 0 and num_beams 1")
    return int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or _LONGEST)
