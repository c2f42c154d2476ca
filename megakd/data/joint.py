"""What one step learns from: a batch of image-text pairs, a batch of questions, or one of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megakd.data.bad import BadCounter
from megakd.data.loader import Batch, TrainBatches
from megakd.data.question_loader import QuestionBatch, QuestionBatches


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
    def bad(self) -> BadCounter:
        """What this rank skipped of both."""
        merged = BadCounter()
        for batch in (self.pairs, self.questions):
            if batch is not None:
                merged.merge(batch.bad)
        return merged

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
