"""The training of a question reader on one device, from questions and the patch tokens of their images.

The loss is the cross-entropy with the shares that the benchmark's scores give the answers of a question: for VQAv2 the more people said it,
the larger (as arXiv 1704.03162; Teney et al., arXiv 1708.02711, take sigmoids of the same scores). AdamW, clipped at norm 1.
Legend: N images, P tokens of an image, C their channels, Q questions, B of a batch, L words, A answers.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.question_reader import PAD, SUMMARY, UNKNOWN, QuestionReader
from megakd.recipe.evaluation import Reader
from megakd.vqa.benchmarks.base import Benchmark, Question
from megakd.vqa.sets import QuestionSet

LONGEST = 64  # words of a question that are read
_WORD = re.compile(r"\w+")
_CLIP, _WEIGHT_DECAY, _BETAS = 1.0, 0.01, (0.9, 0.98)
_IN_PIECES = 4096  # images standardised at once
_FARTHEST = 1e3  # deviations of a standardised channel: beyond, a few outliers would be all that float16 gradients know


@dataclass(frozen=True)
class Seen:
    """The images' tokens, standardised, on the CPU."""

    tokens_NPC: Tensor

    def of(self, image_B: Tensor, device: torch.device) -> Tensor:
        """(B, P, C), float32; zeros, the mean of every channel, for a question without an image, whose number is below 0."""
        tokens_BPC = self.tokens_NPC[image_B.clamp(min=0)].to(device).float()
        return tokens_BPC * (image_B >= 0).to(device).view(-1, 1, 1)


def standardise(tokens_NPC: Tensor, train: list[int]) -> None:
    """In place: every channel with mean 0 and deviation 1 over all tokens of the images `train`; one that never changes becomes 0.

    So no tower has a handicap by the scale of its residual stream, and none an advantage.
    """
    count, total_C, squares_C = 0, torch.zeros(tokens_NPC.shape[2]).double(), torch.zeros(tokens_NPC.shape[2]).double()
    for start in range(0, len(train), _IN_PIECES):
        rows = tokens_NPC[train[start : start + _IN_PIECES]].flatten(0, 1).double()
        count, total_C, squares_C = count + len(rows), total_C + rows.sum(dim=0), squares_C + rows.square().sum(dim=0)
    mean_C = total_C / max(count, 1)
    deviation_C = (squares_C / max(count, 1) - mean_C.square()).clamp(min=0).sqrt()
    moves_C = deviation_C > 1e-6 * mean_C.abs()
    scale_C = torch.where(moves_C, 1 / deviation_C.where(moves_C, 1.0), 0.0)
    for start in range(0, len(tokens_NPC), _IN_PIECES):
        piece = tokens_NPC[start : start + _IN_PIECES]
        piece.copy_(((piece.double() - mean_C) * scale_C).clamp(-_FARTHEST, _FARTHEST))


@dataclass(frozen=True)
class Lessons:
    """The training questions. words: their ids. answers: the closed vocabulary, the most frequent first.

    word_QL: ids, see `word_ids`. image_Q: numbers of images, below 0 without one. shares: of each question, numbers of answers and shares
    of their scores.
    """

    words: dict[str, int]
    answers: list[str]
    word_QL: Tensor
    image_Q: Tensor
    shares: list[tuple[list[int], list[float]]]

    @classmethod
    def nothing(cls) -> Lessons:
        """For ranks that do not train."""
        return cls({}, [], torch.zeros(0, 1).long(), torch.zeros(0).long(), [])

    @classmethod
    def of(cls, questions: QuestionSet, of_format: Benchmark, usable: list[tuple[int, int]], most: int) -> Lessons:
        """usable: indices of questions, each with its image's number. Those of which no answer is in the vocabulary are left out."""
        counted = Counter(questions[index].answer for index, _ in usable)
        answers = sorted(counted, key=lambda answer: (-counted[answer], answer))[:most]
        number = {answer: place for place, answer in enumerate(answers)}
        every_word = sorted({word for index, _ in usable for word in words_of(questions[index].text)})
        words = {word: SUMMARY + 1 + place for place, word in enumerate(every_word)}
        rows, images, shares = [], [], []
        for index, image in usable:
            question = questions[index]
            if target := _shares(question, number, of_format):
                rows.append(words_of(question.text))
                images.append(image)
                shares.append(target)
        return cls(words, answers, word_ids(rows, words), torch.tensor(images, dtype=torch.int64), shares)

    def target(self, rows: Sequence[int]) -> Tensor:
        """(B, A), rows of sum 1."""
        target_BA = torch.zeros(len(rows), len(self.answers))
        for place, row in enumerate(rows):
            answers, shares = self.shares[row]
            target_BA[place, answers] = torch.tensor(shares)
        return target_BA


def _shares(question: Question, number: dict[str, int], of_format: Benchmark) -> tuple[list[int], list[float]] | None:
    """Numbers of the answers that score, and each one's share of their scores; None where none is in the vocabulary."""
    candidates = dict.fromkeys(answer for answer in (question.answer, *question.answers) if answer in number)
    scores = {number[answer]: score for answer in candidates if (score := of_format.score(question, answer)) > 0}
    total = sum(scores.values())
    return (list(scores), [score / total for score in scores.values()]) if scores else None


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())[:LONGEST]


def word_ids(rows: Iterable[list[str]], words: dict[str, int]) -> Tensor:
    """(Q, 1 + L), int64: SUMMARY, the words' ids, UNKNOWN for those that no training question has, and PAD up to the longest question."""
    ids = [[SUMMARY, *(words.get(word, UNKNOWN) for word in row)] for row in rows]
    longest = max((len(row) for row in ids), default=1)
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in ids], dtype=torch.int64).reshape(-1, longest)


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU this process computes with one thread in here: products this small gain nothing from more, which wait for each other where
    runs share the cores, and no number of threads then changes a score."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Training:
    """One reader. seen: what it is shown; None trains a blind one. torch's global generator is left as it was."""

    def __init__(self, settings: Reader, lessons: Lessons, seen: Seen | None, device: torch.device) -> None:
        self.settings, self._lessons, self._seen, self._device = settings, lessons, seen, device
        image = None if seen is None else (seen.tokens_NPC.shape[1], seen.tokens_NPC.shape[2])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            places = SUMMARY + 1 + len(lessons.words)
            self._reader = QuestionReader(places, LONGEST, image, len(lessons.answers), settings.width).to(device)
        self._optimiser = torch.optim.AdamW(self._reader.parameters(), lr=settings.lr, betas=_BETAS, weight_decay=_WEIGHT_DECAY)
        self._draws = torch.Generator().manual_seed(settings.seed)
        self._order: list[int] = []
        self._loss = torch.zeros(())

    def step(self, number: int) -> None:
        """The step number `number`, from 0. Each round through the questions has an order of its own; what is left of one is left out."""
        settings, lessons = self.settings, self._lessons
        size = min(settings.batch, len(lessons.image_Q))
        if len(self._order) < size:
            self._order = torch.randperm(len(lessons.image_Q), generator=self._draws).tolist()
        rows, self._order = self._order[:size], self._order[size:]
        warmup = max(1, settings.steps // 10)
        rate = settings.lr * min(1.0, (number + 1) / warmup) * (1 + math.cos(math.pi * number / settings.steps)) / 2
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        logits_BA = self._logits(lessons.word_QL[rows], lessons.image_Q[rows])
        self._loss = F.cross_entropy(logits_BA, lessons.target(rows).to(self._device))
        self._optimiser.zero_grad(set_to_none=True)
        self._loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._reader.parameters(), _CLIP)
        self._optimiser.step()

    def is_finite(self) -> bool:
        return bool(self._loss.isfinite()) and all(bool(value.isfinite().all()) for value in self._reader.parameters())

    def answer(self, texts: Sequence[str], images: Sequence[int]) -> list[str]:
        """One of the vocabulary's answers to each question; of equal ones the more frequent."""
        answers = []
        with torch.no_grad():
            for start in range(0, len(texts), self.settings.batch):
                part = slice(start, start + self.settings.batch)
                ids_BL = word_ids(map(words_of, texts[part]), self._lessons.words)
                best_B = self._logits(ids_BL, torch.tensor(images[part], dtype=torch.int64)).argmax(dim=1)
                answers += [self._lessons.answers[number] for number in best_B.tolist()]
        return answers

    def _logits(self, word_BL: Tensor, image_B: Tensor) -> Tensor:
        """(B, A). The columns that only pad are left out."""
        longest = int((word_BL != PAD).sum(dim=1).max())
        shown = None if self._seen is None else self._seen.of(image_B, self._device)
        return self._reader(word_BL[:, :longest].to(self._device), shown)  # type: ignore[no-any-return]
