"""Questions that a student and its teacher read together: prompts, places of images and pixels of each, and one answer."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg
from transformers import PreTrainedTokenizerBase

from megakd.data.bad_samples import BadSample
from megakd.data.transforms import decode, evaluation_pixels
from megakd.recipe import Data, Decoder
from megakd.vqa import check, loader
from megakd.vqa.loader import ImageProcessor, QuestionBatch, TeacherReader
from megakd.vqa.prompts import PromptEncoder
from megakd.vqa.sets import Mixture, QuestionWithImage, question_order
from support import questions as files
from support.questions import mixture, source
from support.shards import write_set

EYES = ImageProcessor(PreprocessCfg(size=(24, 20), resize_mode="squash"), Data(max_pixels=50_000), "tower")
LARGER = ImageProcessor(PreprocessCfg(size=(40, 40), resize_mode="shortest"), Data(max_pixels=50_000), "tower")
BATCH = 8
pytestmark = pytest.mark.usefixtures("no_process_is_left")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """30 questions, three an image; 3 conversations, one of two turns, one without image; 5 captions."""
    folder = tmp_path_factory.mktemp("clean")
    sources = {"vqa": files.vqav2(folder / "v"), "talk": files.llava(folder / "t")}
    sources["pairs"] = source("captions", images=write_set(folder / "c", 5, 2))
    return mixture(**sources)


@pytest.fixture(scope="module")
def student(shapes: PreTrainedTokenizerBase) -> PromptEncoder:
    return PromptEncoder(shapes, Decoder(model="any", template="{question} ", instruction=""), 4, 32)


@pytest.fixture(scope="module")
def teacher(shapes: PreTrainedTokenizerBase) -> PromptEncoder:
    return PromptEncoder(shapes, Decoder(model="any", template="the star is {question} red ", instruction=" is it"), 9, 60)


def take(questions: Mixture, encoder: PromptEncoder, eyes: ImageProcessor | None, reader: TeacherReader | None, workers: int = 0):
    order = question_order(questions, BATCH, seed=3)
    ranks = {"rank": 0, "world": 1, "workers": workers, "start_position": 0, "pin_memory": False}
    with loader.question_batches(questions, order, encoder, eyes, reader, **ranks) as batches:
        return list(itertools.islice(batches, 4))


def answers(batch: QuestionBatch) -> tuple[list[list[int]], list[list[int]]]:
    """Of each row, as the student and as the teacher has them."""
    assert batch.teacher is not None
    return tuple([row[row != -100].tolist() for row in labels] for labels in (batch.labels_BL, batch.teacher.labels_BL))  # type: ignore[return-value]


@pytest.mark.parametrize("workers", [0, 2])
def test_both_read_the_same_answers_to_the_same_question_in_places_of_their_own(
    clean: Mixture, student: PromptEncoder, teacher: PromptEncoder, workers: int
) -> None:
    alone = take(clean, student, EYES, None)
    for batch, without in zip(take(clean, student, EYES, TeacherReader(teacher, LARGER), workers), alone, strict=True):
        own, theirs = answers(batch)
        assert own == theirs
        assert all(own)
        assert without.teacher is None
        assert all(torch.equal(getattr(batch, name), getattr(without, name)) for name in ("ids_BL", "labels_BL", "pixels", "index"))
        read = batch.teacher
        assert read is not None
        assert read.pixels is not None
        assert (read.pixels.shape, read.pixels.dtype) == ((BATCH, 3, 40, 40), torch.uint8)
        assert read.image_mask_BL.sum(1).tolist() == [9 * seen for seen in batch.has_image.tolist()]
        assert not (read.labels_BL != -100)[read.image_mask_BL | ~read.attend_BL].any()
        assert not torch.equal(read.labels_BL[:, : batch.labels_BL.shape[1]], batch.labels_BL), "the columns differ"
        for row, index in enumerate(batch.index.tolist()):
            (asked,) = clean.read([index], True)
            assert isinstance(asked, QuestionWithImage)
            ids = read.ids_BL[row][read.attend_BL[row]].tolist()
            assert ids == teacher.training(asked.question, asked.image is not None).ids
            if asked.image is not None:
                assert np.array_equal(read.pixels[row], evaluation_pixels(decode(asked.image, 10**6), LARGER.preprocess))
            else:
                assert not read.pixels[row].any()


def test_only_a_teacher_with_eyes_gets_pixels(clean: Mixture, student: PromptEncoder, teacher: PromptEncoder) -> None:
    blind = dataclasses.replace(teacher, image_tokens=0)
    for batch in take(clean, student, EYES, TeacherReader(blind, None)):
        assert batch.pixels is not None
        assert batch.teacher is not None
        assert batch.teacher.pixels is None
        assert not batch.teacher.image_mask_BL.any()
    for batch in take(clean, dataclasses.replace(student, image_tokens=0), None, TeacherReader(teacher, LARGER)):
        assert batch.pixels is None
        assert batch.teacher is not None
        assert batch.teacher.pixels is not None
        assert bool(batch.teacher.image_mask_BL.any())
        assert batch.teacher.pixels[batch.teacher.image_mask_BL.any(1)].any()


def test_a_batch_moves_with_what_its_teacher_reads(clean: Mixture, student: PromptEncoder, teacher: PromptEncoder) -> None:
    for eyes in (LARGER, None):
        reader = TeacherReader(teacher if eyes else dataclasses.replace(teacher, image_tokens=0), eyes)
        moved = take(clean, student, EYES, reader)[0].to("meta", non_blocking=True)
        assert moved.teacher is not None
        assert {column.device.type for column in moved.teacher if column is not None} == {"meta"}
        assert (moved.teacher.pixels is None) == (eyes is None)


@pytest.fixture
def talk(tmp_path: Path):
    """A conversation of two turns."""
    return next(one for one in files.opened(files.llava(tmp_path)) if len(one.conversation) == 2)


def test_the_teacher_reads_the_turns_that_the_student_keeps(talk, student: PromptEncoder, teacher: PromptEncoder) -> None:
    whole = student.training(talk, image=True)
    cut = dataclasses.replace(student, max_length=len(whole.ids) - 1).training(talk, image=True)
    assert (whole.turns, cut.turns) == (2, 1)
    for learned in (whole, cut):
        read = teacher.taught(talk, learned, image=True)
        assert read.learned == learned.learned
        assert read.turns == learned.turns
    short = dataclasses.replace(teacher, max_length=len(teacher.taught(talk, whole, image=True).ids) - 1, limit="positions")
    with pytest.raises(BadSample, match=r"2 turns, of which 1 fit: positions = \d+ tokens") as caught:
        short.taught(talk, whole, image=True)
    assert caught.value.reason == "too_long"
    with pytest.raises(BadSample, match=r"\d+ tokens, positions = 12"):
        dataclasses.replace(teacher, max_length=12, limit="positions").taught(talk, cut, image=True)


def test_a_template_after_which_the_answer_has_other_ids_is_refused(clean: Mixture, student: PromptEncoder, teacher: PromptEncoder) -> None:
    """The template's last word and the answer's first become one word, which the vocabulary does not know."""
    joined = dataclasses.replace(teacher, settings=teacher.settings.model_copy(update={"template": "{question}answer"}))
    (asked,) = clean.read([0], True)
    assert isinstance(asked, QuestionWithImage)
    learned = student.training(asked.question, image=True)
    with pytest.raises(BadSample, match=r"after decoder\.template, and .* after the teacher's, '{question}answer'"):
        joined.taught(asked.question, learned, image=True)
    reader = TeacherReader(joined, LARGER)
    with pytest.raises(
        ValueError, match=r"mine: \d+ of 30 questions looked at cannot be put to answers\.teacher.*let decoder\.template end as"
    ):
        check.try_teacher(clean.sets["vqa"], student, reader, True, "mine", 0.01)
    (said,) = check.try_teacher(clean.sets["vqa"], student, reader, True, "mine", 1.0)
    assert said.endswith("they are replaced by others")
    assert check.try_teacher(clean.sets["vqa"], student, TeacherReader(teacher, LARGER), True, "mine", 0.0) == []
