"""A megakd bundle as lmms-eval asks it: greedy answers, one image a question, the harness's own prompts in the bundle's template.

Scores of the two differ where their rules do, not their answers: lmms-eval processes unanimous answers too, takes POPE's "Yes." for
wrong and its yes-ratio from the labels (see `vqa/benchmarks/pope.py`). Prompts come with the instruction that their task's YAML
appends; the bundle was trained with `decoder.instruction`, and the two should say the same.
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


class _Asked(NamedTuple):
    """A request: its image, its words, and its place for people."""

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
            first = batch[0].args[1]
            until, longest = _stops(first), _length(first)
            asked = [self._asked(request.args) for request in batch]
            answers += [_cut(answer, until) for answer in self._answer(asked, longest)]
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """(loss, greedy) for each request: -log p of the continuation and the end after it, a token; whether it is the greedy answer.

        What does not fit the decoder's context has an infinite loss, and is not what the decoder would say.

        The loss, not the likelihood: lmms-eval's multiple choice takes the smallest. Each pair is in a GenerationResult: evaluator.py of
        0.7.3 turns whatever else is no text into text, pairs too, and then cannot take them apart. Once it leaves pairs alone, so do we.
        """
        found: list[Any] = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            asked = [self._asked(request.args) for request in batch]
            wanted = [self._continuation(request.args) for request in batch]
            losses = self._losses(asked, wanted)
            said = self._answer(asked, max(count for _, count in losses))
            greedy = [count > 0 and answer == want for (_, count), answer, want in zip(losses, said, wanted, strict=True)]
            found += [GenerationResult(text=(loss, same)) for (loss, _), same in zip(losses, greedy, strict=True)]
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Raises ValueError: a bundle learns from single questions, and no round of such a task means something without those before."""
        tasks = sorted({str(request.args[-2]) for request in requests})
        raise ValueError(f"{', '.join(tasks)}: asks in several rounds, and a megakd bundle answers one question at a time: leave it out")

    def _answer(self, asked: Sequence[_Asked], longest: int) -> list[str]:
        """A question that does not fit the decoder's context is answered with "", as in megakd's own evaluation."""
        fits = [longest > 0 and self._fitting(one, None) is not None for one in asked]
        kept = list(itertools.compress(asked, fits))
        said = iter(self._bundle.answer([one.image for one in kept], [one.text for one in kept], longest))
        return [next(said) if fit else "" for fit in fits]

    def _fitting(self, asked: _Asked, answer: str | None) -> Encoded | None:
        """The question, with the answer if one is given, as ids. None, with a line in the log, where it is longer than the context."""
        conversations, sees = self._bundle.conversations, asked.image is not None and self._bundle.towers is not None
        try:
            if answer is None:
                return conversations.prompt(asked.text, False, sees)
            return conversations.training(Question(asked.where, None, asked.text, (answer,), answer, ""), sees)
        except BadSample as bad:
            log.warning("not asked: %s, %r: %s", asked.where, asked.text[:80], bad)
            return None

    @torch.no_grad()
    def _losses(self, asked: Sequence[_Asked], wanted: Sequence[str]) -> list[tuple[float, int]]:
        """The mean -log p of each answer's tokens, and how many there are: infinite, and none, where it does not fit."""
        encoded = [self._fitting(one, answer) for one, answer in zip(asked, wanted, strict=True)]
        fits = [one is not None for one in encoded]
        if not any(fits):
            return [(math.inf, 0)] * len(asked)
        bundle = self._bundle
        batch = stack([one for one in encoded if one is not None], bundle.conversations.padding, left=False)
        ids_BL, attend_BL, image_mask_BL, labels_BL = (tensor.to(self.device) for tensor in batch)
        visual = bundle.look([one.image for one in itertools.compress(asked, fits)])
        outputs = bundle.decoder(visual, ids_BL, attend_BL, image_mask_BL, labels_BL)
        tokens_B = outputs["answer_tokens"]
        found = zip((outputs["answer_nll"] / tokens_B).tolist(), map(int, tokens_B.tolist()), strict=True)
        return [next(found) if fit else (math.inf, 0) for fit in fits]

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[Any]]:
        """At most batch_size neighbours with the same settings."""
        for _, alike in itertools.groupby(requests, lambda request: json.dumps(request.args[1], sort_keys=True, default=str)):
            while batch := list(itertools.islice(alike, self.batch_size)):
                yield batch

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def _asked(self, arguments: Sequence[Any]) -> _Asked:
        look: Callable[[Any], list[Any] | None] | None = arguments[2]
        number, task, split = arguments[3:6]
        seen = (look(self._document(task, split, number)) or []) if look is not None else []
        if len(seen) > 1 or not all(isinstance(one, Image.Image) for one in seen):
            kinds = ", ".join(type(one).__name__ for one in seen)
            raise ValueError(f"{task}: question {number} shows {len(seen)} things ({kinds}): a megakd bundle takes one image, or none")
        return _Asked(seen[0].convert("RGB") if seen else None, arguments[0], f"{task}: question {number}")

    def _continuation(self, arguments: Sequence[Any]) -> str:
        target = arguments[1]
        number, task, split = arguments[3:6]
        return str(target(self._document(task, split, number)) if callable(target) else target).strip()


def _stops(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _length(settings: dict[str, Any]) -> int:
    sampled = settings.get("do_sample")
    if sampled is None:  # where it is false, as in mmvet, the temperature has no say
        sampled = settings.get("temperature")
    if sampled or (settings.get("num_beams") or 1) > 1:
        raise ValueError(f"generation_kwargs = {settings}: megakd answers greedily; set do_sample false, temperature 0 and num_beams 1")
    return int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or _LONGEST)


def _cut(answer: str, until: Sequence[str]) -> str:
    """The answer before the first of the texts that end it."""
    for stop in filter(None, until):
        answer = answer.split(stop)[0]
    return answer.strip()
