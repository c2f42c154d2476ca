"""What one step learns from: a batch of image-text pairs, a batch of questions, or one of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from megakd.data.bad_samples import BadCounter, Reason
from megakd.data.pairs import Batch, TrainBatches
from megakd.vqa.loader import QuestionBatch, QuestionBatches


@dataclass(frozen=True)
class BadSamples:
    """What was bad among pairs and among questions, each by itself: many good pairs would hide that hardly a question is usable."""

    pairs: BadCounter = field(default_factory=BadCounter)
    questions: BadCounter = field(default_factory=BadCounter)

    def merge(self, other: BadSamples) -> None:
        self.pairs.merge(other.pairs)
        self.questions.merge(other.questions)

    @property
    def counts(self) -> dict[Reason, int]:
        """Of both, by reason."""
        both = BadCounter()
        both.merge(self.pairs)
        both.merge(self.questions)
        return both.counts

    def to_list(self) -> list[int]:
        """As BadCounter's: of fixed length, to be summed over ranks."""
        return self.pairs.to_list() + self.questions.to_list()

    @classmethod
    def from_list(cls, values: Sequence[int], here: BadSamples) -> BadSamples:
        """The inverse of `to_list`, with this rank's examples."""
        half = len(values) // 2
        pairs = BadCounter.from_list(values[:half], here.pairs.examples)
        return cls(pairs, BadCounter.from_list(values[half:], here.questions.examples))

    def check(self, max_bad_fraction: float, pairs: int, questions: int) -> None:
        """Raises ValueError when too many of either are bad, judged from at least so many seen: a step's pairs, a step's questions."""
        self.pairs.check(max_bad_fraction, at_least=pairs)
        self.questions.check(max_bad_fraction, at_least=questions, what="questions")


@dataclass(frozen=True)
class JointBatch:
    """One rank's part of a step. At least one of the two is there."""

    pairs: Batch | None
    questions: QuestionBatch | None

    @property
    def next_position(self) -> int:
        """Of the pairs, where there are any, else of the questions; the questions' is a function of the step alone."""
        leading = self.pairs or self.questions
        assert leading is not None
        return leading.next_position

    @property
    def bad(self) -> BadSamples:
        """What this rank skipped of both."""
        return BadSamples(*(BadCounter() if part is None else part.bad for part in (self.pairs, self.questions)))

    def to(self, device: torch.device, non_blocking: bool) -> JointBatch:
        pairs, questions = self.pairs, self.questions
        return replace(
            self,
            pairs=pairs.to(device, non_blocking) if pairs is not None else None,
            questions=questions.to(device, non_blocking) if questions is not None else None,
        )


class JointBatches(Iterator[JointBatch]):
    """An endless iterator and a context manager over the two loaders; `close()` ends their workers."""

    def __init__(self, pairs: TrainBatches | None, questions: QuestionBatches | None) -> None:
        self._pairs, self._questions = pairs, questions

    def __next__(self) -> JointBatch:
        return JointBatch(None if self._pairs is None else next(self._pairs), None if self._questions is None else next(self._questions))

    def close(self) -> None:
        for stream in (self._pairs, self._questions):
            if stream is not None:
                stream.close()

    def __enter__(self) -> JointBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
