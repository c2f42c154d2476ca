"""A megakd bundle as lmms-eval asks it: greedy answers, one image a question, the harness's own prompts in the bundle's template.

Scores of the two differ where their rules do, not their answers: lmms-eval processes unanimous answers too, takes POPE's "Yes." for
wrong and its yes-ratio from the labels (see `evaluation/vqa_metrics.py`). Prompts come with the instruction that their task's YAML
appends; the bundle was trained with `decoder.instruction`, and the two should say the same.
Source: lmms_eval/api/model.py and api/task.py of lmms-eval 0.7.3
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from lmms_eval.api.instance import GenerationResult  # type: ignore[import-not-found]
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from PIL import Image

from megakd.bundle import Bundle
from megakd.data.bad import BadSample
from megakd.data.conversations import stack
from megakd.data.question_formats import Question

log = logging.getLogger("megakd.harness")
_LONGEST = 16  # tokens of an answer where a task does not say: VQAv2's own setting in lmms-eval


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
            asked = [(self._image(request.args), request.args[0]) for request in batch]
            answers += [_cut(answer, until) for answer in self._answer(asked, longest)]
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """(loss, greedy) for each request: -log p of the continuation and the end after it, a token; whether it is the greedy answer.

        The loss, not the likelihood: lmms-eval's multiple choice takes the smallest. Each pair is in a GenerationResult: evaluator.py of
        0.7.3 turns whatever else is no text into text, pairs too, and then cannot take them apart. Once it leaves pairs alone, so do we.
        """
        found: list[Any] = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            asked = [(self._image(request.args), request.args[0], self._continuation(request.args)) for request in batch]
            losses, lengths = self._losses(asked)
            said = self._answer([(image, text) for image, text, _ in asked], max(lengths))
            greedy = [answer == wanted for answer, (_, _, wanted) in zip(said, asked, strict=True)]
            found += [GenerationResult(text=pair) for pair in zip(losses, greedy, strict=True)]
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Raises ValueError: a bundle learns from single questions, and no round of such a task means something without those before."""
        tasks = sorted({str(request.args[-2]) for request in requests})
        raise ValueError(f"{', '.join(tasks)}: asks in several rounds, and a megakd bundle answers one question at a time: leave it out")

    def _answer(self, asked: Sequence[tuple[Image.Image | None, str]], longest: int) -> list[str]:
        """A question that does not fit the decoder's context is answered with "", as in megakd's own evaluation."""
        fits = [self._fits(image, text) for image, text in asked]
        kept = list(itertools.compress(asked, fits))
        said = iter(self._bundle.answer([image for image, _ in kept], [text for _, text in kept], longest))
        return [next(said) if fit else "" for fit in fits]

    def _fits(self, image: Image.Image | None, text: str) -> bool:
        try:
            self._bundle.conversations.prompt(text, False, image is not None and self._bundle.towers is not None)
        except BadSample as bad:
            log.warning("not asked: %r: %s", text[:80], bad)
            return False
        return True

    @torch.no_grad()
    def _losses(self, asked: Sequence[tuple[Image.Image | None, str, str]]) -> tuple[list[float], list[int]]:
        bundle = self._bundle
        questions = [Question(number, None, text, (wanted,), wanted, "") for number, (_, text, wanted) in enumerate(asked)]
        sees = [image is not None and bundle.towers is not None for image, _, _ in asked]
        encoded = [bundle.conversations.training(question, see) for question, see in zip(questions, sees, strict=True)]
        batch = stack(encoded, bundle.conversations.padding, left=False)
        ids_BL, attend_BL, image_mask_BL, labels_BL = (tensor.to(self.device) for tensor in batch)
        outputs = bundle.decoder(bundle.look([image for image, _, _ in asked]), ids_BL, attend_BL, image_mask_BL, labels_BL)
        tokens_B = outputs["answer_tokens"]
        return (outputs["answer_nll"] / tokens_B).tolist(), [int(count) for count in tokens_B.tolist()]

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[Any]]:
        """At most batch_size neighbours with the same settings."""
        for _, alike in itertools.groupby(requests, lambda request: json.dumps(request.args[1], sort_keys=True, default=str)):
            while batch := list(itertools.islice(alike, self.batch_size)):
                yield batch

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def _image(self, arguments: Sequence[Any]) -> Image.Image | None:
        look: Callable[[Any], list[Any] | None] | None = arguments[2]
        number, task, split = arguments[3:6]
        seen = (look(self._document(task, split, number)) or []) if look is not None else []
        if len(seen) > 1 or not all(isinstance(one, Image.Image) for one in seen):
            kinds = ", ".join(type(one).__name__ for one in seen)
            raise ValueError(f"{task}: question {number} shows {len(seen)} things ({kinds}): a megakd bundle takes one image, or none")
        return seen[0].convert("RGB") if seen else None

    def _continuation(self, arguments: Sequence[Any]) -> str:
        target = arguments[1]
        number, task, split = arguments[3:6]
        return str(target(self._document(task, split, number)) if callable(target) else target).strip()


def _stops(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _length(settings: dict[str, Any]) -> int:
    if settings.get("do_sample") or settings.get("temperature") or (settings.get("num_beams") or 1) > 1:
        raise ValueError(f"generation_kwargs = {settings}: megakd answers greedily; set do_sample false, temperature 0 and num_beams 1")
    return int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or _LONGEST)


def _cut(answer: str, until: Sequence[str]) -> str:
    """The answer before the first of the texts that end it."""
    for stop in filter(None, until):
        answer = answer.split(stop)[0]
    return answer.strip()
