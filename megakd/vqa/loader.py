"""Questions as batches: to train on, without end and resumable anywhere; and as prompts to be answered, each once.

Images take the tower's evaluation path, as it resizes at test time, without crop or flip: "what is left of" and "at the edge" are
answered from the whole picture as it is.

Legend: B questions of a local batch, L tokens of a conversation, H x W the tower's input size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megakd.data.bad_samples import BadCounter, BadLog, BadSample, Reason
from megakd.data.pairs import located
from megakd.data.sampler import Order, Positions
from megakd.data.stream import WorkerStream, reported
from megakd.data.transforms import evaluation_pixels, rgb_image
from megakd.vqa.benchmarks.base import Question
from megakd.vqa.prompts import Encoded, PromptEncoder, stack
from megakd.vqa.sets import Asked, Questions

if TYPE_CHECKING:
    from open_clip.transform import PreprocessCfg

_ATTEMPTS = 64  # as in the shards' loader


@dataclass(frozen=True)
class ImageProcessor:
    """How a decoder sees: the tower's preprocessing, and the largest image that is decoded."""

    preprocess: PreprocessCfg
    max_pixels: int

    def pixels(self, image: bytes) -> NDArray[np.uint8]:
        """(3, H, W). Raises BadSample: corrupt_image, too_large."""
        return evaluation_pixels(rgb_image(image, self.max_pixels), self.preprocess)

    def blank(self) -> NDArray[np.uint8]:
        """(3, H, W) of zeros, in the place of an image that is not there."""
        size = self.preprocess.size
        height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
        return np.zeros((3, int(height), int(width)), np.uint8)


@dataclass(frozen=True)
class QuestionBatch:
    """One rank's part of a global batch of conversations, padded on the right to its own longest.

    position: of the global batch's first question, over all ranks; next_position: what resumes after this batch.
    index: (B,) int64, the questions used, replacements included. Row r was drawn at position + rank * B + r.
    pixels: (B, 3, H, W) uint8, zeros where has_image, (B,) bool, is False; None for a decoder without eyes.
    ids_BL, labels_BL int64 (-100: not learned), attend_BL, image_mask_BL bool: see `prompts`.
    bad: what this rank skipped for this batch, with `seen` questions tried and examples.
    """

    position: int
    next_position: int
    index: torch.Tensor
    pixels: torch.Tensor | None
    has_image: torch.Tensor
    ids_BL: torch.Tensor
    attend_BL: torch.Tensor
    image_mask_BL: torch.Tensor
    labels_BL: torch.Tensor
    bad: BadCounter

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str, non_blocking: bool) -> QuestionBatch:
        """A copy on `device`; `index` stays on the CPU."""
        return dataclasses.replace(self, **_moved(self, lambda tensor: tensor.to(device, non_blocking=non_blocking)))


@dataclass(frozen=True)
class PromptBatch:
    """Questions to be answered, padded on the left: the first generated token follows the last column.

    index: (B,) int64; questions: the B of them; the tensors as in QuestionBatch. unusable: (index, why) of questions that cannot be
    asked, since their image is damaged or they are too long: they are in no row, and B may be 0. Published scores count them as wrong.
    """

    index: torch.Tensor
    pixels: torch.Tensor | None
    has_image: torch.Tensor
    ids_BL: torch.Tensor
    attend_BL: torch.Tensor
    image_mask_BL: torch.Tensor
    questions: list[Question]
    unusable: list[tuple[int, str]]
    bad: BadCounter

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str, non_blocking: bool) -> PromptBatch:
        """A copy on `device`; `index` stays on the CPU."""
        return dataclasses.replace(self, **_moved(self, lambda tensor: tensor.to(device, non_blocking=non_blocking)))

    def pin_memory(self) -> PromptBatch:
        return dataclasses.replace(self, index=self.index.pin_memory(), **_moved(self, torch.Tensor.pin_memory))


class QuestionBatches(Iterator[QuestionBatch]):
    """What `question_batches` returns: an endless iterator and a context manager. `close()` ends its workers."""

    def __init__(self, dataset: _TrainSet, start_position: int, workers: int, pin_memory: bool) -> None:
        self._batch = dataset.order.batch
        self._log = BadLog()
        self._position = start_position
        self._stream: WorkerStream[_Part] = WorkerStream(
            dataset, Positions(dataset.order, dataset.rank, dataset.world, start_position), workers, pin_memory
        )

    def __next__(self) -> QuestionBatch:
        part = next(self._stream)
        bad = BadCounter.from_list(part.counts, part.examples)
        self._log.report(bad)
        if part.tensors is None:
            self.close()
            raise ValueError(part.failure)
        position, self._position = self._position, self._position + self._batch
        return QuestionBatch(position, self._position, *part.tensors, bad)

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> QuestionBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def question_batches(
    questions: Questions,
    order: Order,
    conversations: PromptEncoder,
    eyes: ImageProcessor | None,
    *,
    rank: int,
    world: int,
    start_position: int,
    workers: int,
    pin_memory: bool,
) -> QuestionBatches:
    """This rank's parts of the global batches from `start_position` on, without end. eyes None: no image is read.

    The rows of all ranks, in rank order, are the same for every number of ranks and workers, padding aside.
    Raises ValueError when the global batch does not divide by the ranks, when the order was made for other questions, and, while
    iterating, when no usable question is found for a position; errors of a worker come with its traceback.
    """
    if order.batch % world:
        raise ValueError(f"answers.batch = {order.batch} does not divide by {world} ranks: make it a multiple of the number of ranks")
    if order.samples != len(questions):
        raise ValueError(f"the order covers {order.samples} questions, but the sources hold {len(questions)}")
    if start_position < 0:
        raise ValueError(f"start_position = {start_position}: positions start at 0")
    return QuestionBatches(_TrainSet(questions, order, conversations, eyes, rank, world), start_position, workers, pin_memory)


def evaluation_questions(
    questions: Questions,
    indices: Sequence[int],
    conversations: PromptEncoder,
    eyes: ImageProcessor | None,
    *,
    batch: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[PromptBatch]:
    """The questions `indices`, in order, as prompts. A rank gives its own part of the set, less what is already answered."""
    parts = [list(indices[start : start + batch]) for start in range(0, len(indices), batch)]
    return reported(WorkerStream(_PromptSet(questions, conversations, eyes), parts, min(workers, len(parts)), pin_memory))


def rank_slice(count: int, rank: int, world: int) -> range:
    """This rank's contiguous part of `count` questions: the parts, in rank order, are the set in order."""
    return range(count * rank // world, count * (rank + 1) // world)


class _Tensors(NamedTuple):
    """In the order of QuestionBatch's fields."""

    index_B: torch.Tensor
    pixels: torch.Tensor | None
    has_image: torch.Tensor
    ids_BL: torch.Tensor
    attend_BL: torch.Tensor
    image_mask_BL: torch.Tensor
    labels_BL: torch.Tensor


@dataclass
class _Part:
    """What a worker ships; tensors None: the `failure`."""

    tensors: _Tensors | None
    counts: list[int]
    examples: dict[Reason, str]
    failure: str = ""

    def pin_memory(self) -> _Part:
        if self.tensors is None:
            return self
        pinned = _Tensors(*(None if tensor is None else tensor.pin_memory() for tensor in self.tensors))  # type: ignore[arg-type]
        return dataclasses.replace(self, tensors=pinned)


class _Row(NamedTuple):
    question: Question
    encoded: Encoded
    pixels: NDArray[np.uint8] | None  # None: no image, or no eyes


class _Exhausted(Exception):
    """No usable question was found for a position."""


@dataclass
class _TrainSet:
    """The dataset in the worker: positions -> one part of a batch."""

    questions: Questions
    order: Order
    conversations: PromptEncoder
    eyes: ImageProcessor | None
    rank: int
    world: int

    def __getitems__(self, positions: range) -> _Part:
        bad = BadCounter()
        chosen = [int(index) for index in self.order.indices(positions.start, len(positions))]
        asked = self.questions.read(chosen, self.eyes is not None)
        try:
            placed = [self._place(*place, bad) for place in zip(positions, chosen, asked, strict=True)]
        except _Exhausted as error:
            return _Part(None, bad.to_list(), dict(bad.examples), str(error))
        rows = [row for _, row in placed]
        stacked = stack([row.encoded for row in rows], self.conversations.padding, left=False)
        index = torch.tensor([index for index, _ in placed], dtype=torch.long)
        return _Part(_Tensors(index, *_images(rows, self.eyes), *stacked), bad.to_list(), dict(bad.examples))

    def _place(self, position: int, chosen: int, asked: Asked | BadSample, bad: BadCounter) -> tuple[int, _Row]:
        """The question of one position and what it becomes."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                chosen = self.order.replacement(position, attempt)
                (asked,) = self.questions.read([chosen], self.eyes is not None)
            bad.seen += 1
            try:
                return chosen, _row(asked, self.eyes, self._encoded)
            except BadSample as error:
                bad.add(error.reason, str(error))
        raise _Exhausted(
            f"no usable question in {_ATTEMPTS} attempts for position {position}: {bad.by_reason()}. Example: {bad.example}. "
            f"Almost all of answers.train is unusable: repair it, or raise answers.max_length if questions are too long for it"
        )

    def _encoded(self, question: Question, image: bool) -> Encoded:
        return self.conversations.training(question, image)


@dataclass
class _PromptSet:
    questions: Questions
    conversations: PromptEncoder
    eyes: ImageProcessor | None

    def __getitems__(self, indices: list[int]) -> PromptBatch:
        rows: list[_Row] = []
        used: list[int] = []
        bad, unusable = BadCounter(seen=len(indices)), []
        for index, asked in zip(indices, self.questions.read(indices, self.eyes is not None), strict=True):
            try:
                rows.append(_row(asked, self.eyes, self._encoded))
                used.append(index)
            except BadSample as error:
                bad.add(error.reason, str(error))
                unusable.append((index, f"{error.reason}: {error}"))
        ids, attend, image_mask, _ = stack([row.encoded for row in rows], self.conversations.padding, left=True)
        images, index_B = _images(rows, self.eyes), torch.tensor(used, dtype=torch.long)
        return PromptBatch(index_B, *images, ids, attend, image_mask, [row.question for row in rows], unusable, bad)

    def _encoded(self, question: Question, image: bool) -> Encoded:
        return self.conversations.prompt(question.text, question.short, image)


def _row(asked: Asked | BadSample, eyes: ImageProcessor | None, encode: Callable[[Question, bool], Encoded]) -> _Row:
    """Raises BadSample, with its place, for what cannot be read, seen or encoded."""
    if isinstance(asked, BadSample):
        raise asked
    with located(asked.where):
        pixels = None if eyes is None or asked.image is None else eyes.pixels(asked.image)
        return _Row(asked.question, encode(asked.question, pixels is not None), pixels)


def _images(rows: list[_Row], eyes: ImageProcessor | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(pixels, has_image) of the rows."""
    has_image = torch.tensor([row.pixels is not None for row in rows], dtype=torch.bool)
    if eyes is None:
        return None, has_image
    blank = eyes.blank()
    pixels = np.empty((len(rows), *blank.shape), np.uint8)
    for place, row in enumerate(rows):
        pixels[place] = blank if row.pixels is None else row.pixels
    return torch.from_numpy(pixels), has_image


def _moved(batch: QuestionBatch | PromptBatch, move: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """The batch's tensors but `index`, each moved."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.name != "index"}
    return {name: move(value) for name, value in fields.items() if isinstance(value, torch.Tensor)}
