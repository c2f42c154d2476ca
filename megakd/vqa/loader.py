"""Questions as batches: to train on, without end and resumable anywhere; and as prompts to be answered, each once.

Images are resized as at test time (`data/image_fit.py`), without random crop or flip: "what is left of" is answered from what is there.

Legend: B questions of a local batch, L tokens of a conversation, H x W the tower's input size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from megakd.data.bad_samples import BadCounter, BadSample, located, usable
from megakd.data.image_fit import fitted_pixels
from megakd.data.mixture import AnyOrder
from megakd.data.resumable import BatchSource, Loading, ResumableBatches
from megakd.data.stream import WorkerStream, reported
from megakd.data.transforms import input_size, rgb_image
from megakd.recipe import Data
from megakd.recipe.vqa import ImageFit
from megakd.vqa.benchmarks.base import Question
from megakd.vqa.prompts import Encoded, PromptEncoder, stack
from megakd.vqa.sets import Questions, QuestionWithImage

if TYPE_CHECKING:
    from open_clip.transform import PreprocessCfg
    from PIL import Image


@dataclass(frozen=True)
class ImageProcessor:
    """Makes images ready for a decoder's tower: its preprocessing, how `data` says that images are read, and `decoder.image_fit`."""

    preprocess: PreprocessCfg
    data: Data
    fit: ImageFit

    def pixels(self, image: bytes) -> NDArray[np.uint8]:
        """(3, H, W). Raises BadSample: corrupt_image, too_large."""
        return self.pixels_of(self.decoded(image))

    def decoded(self, image: bytes) -> Image.Image:
        """In RGB. Raises as `pixels` does."""
        return rgb_image(image, self.data)

    def pixels_of(self, picture: Image.Image) -> NDArray[np.uint8]:
        return fitted_pixels(picture, self.preprocess, self.fit)

    def blank(self) -> NDArray[np.uint8]:
        """(3, H, W) of zeros, in the place of a missing image."""
        return np.zeros((3, *input_size(self.preprocess)), np.uint8)


@dataclass(frozen=True)
class TeacherReader:
    """How a teacher is given the student's questions: by its own prompts and its own tower's pixels; None where it sees nothing."""

    encoder: PromptEncoder
    image_processor: ImageProcessor | None


class TeacherRows(NamedTuple):
    """The questions of a batch as the teacher reads them, row by row; fields as `QuestionBatch` has them.

    The k-th learned token of a row is the student's k-th, in another column.
    """

    pixels: torch.Tensor | None
    ids_BL: torch.Tensor
    attend_BL: torch.Tensor
    image_mask_BL: torch.Tensor
    labels_BL: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """B questions as ids: `index`, (B,) int64, says which.

    pixels: (B, 3, H, W) uint8, zeros where has_image, (B,) bool, is False; None for a decoder that is shown no images.
    ids_BL int64, attend_BL, image_mask_BL bool: see `prompts`. bad: what was skipped, of `seen` questions tried.
    """

    index: torch.Tensor
    pixels: torch.Tensor | None
    has_image: torch.Tensor
    ids_BL: torch.Tensor
    attend_BL: torch.Tensor
    image_mask_BL: torch.Tensor
    bad: BadCounter

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str, non_blocking: bool) -> Self:
        """A copy on `device`; `index` stays on the CPU."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor], **changes: Any) -> Self:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "index"}
        tensors: dict[str, Any] = {name: move(value) for name, value in fields.items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors, **changes)


@dataclass(frozen=True, kw_only=True)
class QuestionBatch(EncodedBatch):
    """One rank's part of a global batch of conversations, padded on the right to its own longest; labels_BL int64 (-100: not learned).

    position: of the global batch's first question; next_position: what resumes after this batch. `index` has the replacements of bad
    questions; row r was drawn at position + rank * B + r. teacher: None where no teacher reads along.
    """

    position: int
    next_position: int
    labels_BL: torch.Tensor
    teacher: TeacherRows | None = None

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor], **changes: Any) -> Self:
        if self.teacher is not None:
            changes["teacher"] = TeacherRows(*(None if column is None else move(column) for column in self.teacher))  # type: ignore[arg-type]
        return super()._moved(move, **changes)


@dataclass(frozen=True, kw_only=True)
class PromptBatch(EncodedBatch):
    """B questions to be answered, padded on the left: the first generated token follows the last column.

    unusable: (index, why) of questions that cannot be asked, as their image is damaged or they are too long: they are in no row, and B may
    be 0. Published scores count them as wrong.
    """

    questions: list[Question]
    unusable: list[tuple[int, str]]

    def pin_memory(self) -> PromptBatch:
        return self._moved(torch.Tensor.pin_memory, index=self.index.pin_memory())


def question_batches(
    questions: Questions,
    order: AnyOrder,
    encoder: PromptEncoder,
    image_processor: ImageProcessor | None,
    teacher: TeacherReader | None = None,
    **loading: Unpack[Loading],
) -> QuestionBatches:
    """This rank's parts of the global batches from `start_position` on, without end. image_processor None: the decoder is shown no image.

    teacher: reads the same questions and images along; a question that it cannot be given is a bad one.
    The rows of all ranks, in rank order, are the same for every number of ranks and workers, padding aside. Raises what `ResumableBatches`
    does.
    """

    def to_batch(position: int, next_position: int, index: torch.Tensor, columns: _QuestionColumns, bad: BadCounter) -> QuestionBatch:
        return QuestionBatch(position=position, next_position=next_position, index=index, bad=bad, **columns._asdict())

    return ResumableBatches(_TrainingQuestions(questions, encoder, image_processor, teacher), order, to_batch, **loading)


def evaluation_questions(
    questions: Questions,
    indices: Sequence[int],
    encoder: PromptEncoder,
    image_processor: ImageProcessor | None,
    *,
    batch: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[PromptBatch]:
    """The questions `indices`, in order, as prompts."""
    parts = [list(indices[start : start + batch]) for start in range(0, len(indices), batch)]
    return reported(WorkerStream(_Prompts(questions, encoder, image_processor), parts, min(workers, len(parts)), pin_memory))


def rank_slice(count: int, rank: int, world: int) -> range:
    """This rank's contiguous part of `count` questions."""
    return range(count * rank // world, count * (rank + 1) // world)


class _QuestionColumns(NamedTuple):
    """Fields of QuestionBatch."""

    pixels: torch.Tensor | None
    has_image: torch.Tensor
    ids_BL: torch.Tensor
    attend_BL: torch.Tensor
    image_mask_BL: torch.Tensor
    labels_BL: torch.Tensor
    teacher: TeacherRows | None = None


QuestionBatches = ResumableBatches[_QuestionColumns, QuestionBatch]


class _EncodedQuestion(NamedTuple):
    question: Question
    encoded: Encoded
    pixels: NDArray[np.uint8] | None  # None: no image, or none is shown to the decoder
    teacher: _EncodedQuestion | None = None  # as the teacher reads it


@dataclass(frozen=True)
class _TrainingQuestions(BatchSource[QuestionWithImage, list[_EncodedQuestion], _QuestionColumns]):
    questions: Questions
    encoder: PromptEncoder
    image_processor: ImageProcessor | None
    teacher: TeacherReader | None

    item_name = "question"
    contents = "sources"
    batch_key = "answers.batch"
    remedy = "Almost all of answers.train is unusable: repair it, or raise answers.max_length if questions are too long for it"

    def __len__(self) -> int:
        return len(self.questions)

    def read(self, indices: Sequence[int]) -> list[QuestionWithImage | BadSample]:
        seen = self.image_processor is not None or (self.teacher is not None and self.teacher.image_processor is not None)
        return self.questions.read(indices, seen)

    def allocate(self, count: int) -> list[_EncodedQuestion]:
        return []

    def fill(self, rows: list[_EncodedQuestion], row: int, position: int, index: int, item: QuestionWithImage) -> None:
        rows.append(_encoded_question(item, self.image_processor, self.encoder.training, self.teacher))

    def collate(self, rows: list[_EncodedQuestion], positions: range, index_B: NDArray[np.int64]) -> _QuestionColumns:
        stacked = stack([row.encoded for row in rows], self.encoder.padding, left=False)
        columns = _QuestionColumns(*_images(rows, self.image_processor), *stacked)
        if self.teacher is None:
            return columns
        taught = [row.teacher for row in rows if row.teacher is not None]
        pixels, _ = _images(taught, self.teacher.image_processor)
        read = stack([row.encoded for row in taught], self.teacher.encoder.padding, left=False)
        return columns._replace(teacher=TeacherRows(pixels, *read))


@dataclass
class _Prompts:
    questions: Questions
    encoder: PromptEncoder
    image_processor: ImageProcessor | None

    def __getitems__(self, indices: list[int]) -> PromptBatch:
        def encode(question: Question, image: bool) -> Encoded:
            return self.encoder.prompt(question.text, question.short, image)

        items = self.questions.read(indices, self.image_processor is not None)
        made = usable(indices, items, lambda _, item: _encoded_question(item, self.image_processor, encode))
        ids, attend, image_mask, _ = stack([row.encoded for row in made.rows], self.encoder.padding, left=True)
        pixels, has_image = _images(made.rows, self.image_processor)
        return PromptBatch(
            index=torch.tensor(made.index_of_row, dtype=torch.long),
            pixels=pixels,
            has_image=has_image,
            ids_BL=ids,
            attend_BL=attend,
            image_mask_BL=image_mask,
            bad=made.bad,
            questions=[row.question for row in made.rows],
            unusable=[(index, f"{bad.reason}: {bad}") for index, bad in made.unusable],
        )


def _encoded_question(
    item: QuestionWithImage,
    image_processor: ImageProcessor | None,
    encode: Callable[[Question, bool], Encoded],
    teacher: TeacherReader | None = None,
) -> _EncodedQuestion:
    """Raises BadSample, with its place, for what cannot be read, seen or encoded."""
    with located(item.where):
        theirs = None if teacher is None else teacher.image_processor
        seeing = image_processor or theirs
        picture = None if seeing is None or item.image is None else seeing.decoded(item.image)
        pixels = None if image_processor is None or picture is None else image_processor.pixels_of(picture)
        row = _EncodedQuestion(item.question, encode(item.question, pixels is not None), pixels)
        if teacher is None:
            return row
        seen = None if theirs is None or picture is None else theirs.pixels_of(picture)
        taught = teacher.encoder.taught(item.question, row.encoded, seen is not None)
        return row._replace(teacher=_EncodedQuestion(item.question, taught, seen))


def _images(rows: list[_EncodedQuestion], image_processor: ImageProcessor | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(pixels, has_image) of the rows."""
    has_image = torch.tensor([row.pixels is not None for row in rows], dtype=torch.bool)
    if image_processor is None:
        return None, has_image
    blank = image_processor.blank()
    pixels = np.empty((len(rows), *blank.shape), np.uint8)
    for place, row in enumerate(rows):
        pixels[place] = blank if row.pixels is None else row.pixels
    return torch.from_numpy(pixels), has_image
