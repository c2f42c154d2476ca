"""The loader of questions: the same global batches for any number of ranks and workers, exact resume, bad questions replaced."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from open_clip.transform import PreprocessCfg
from transformers import PreTrainedTokenizerBase

from megakd.data.transforms import decode, evaluation_pixels
from megakd.recipe import Data, Decoder
from megakd.vqa import loader
from megakd.vqa.loader import ImageProcessor, PromptBatch, QuestionBatch, QuestionBatches
from megakd.vqa.prompts import PromptEncoder
from megakd.vqa.sets import Mixture, question_order
from support import questions as files
from support.questions import mixture, source, talk, write
from support.shards import bomb_png, jpeg, write_set

PREPROCESS = PreprocessCfg(size=(24, 20), resize_mode="squash")
EYES = ImageProcessor(PREPROCESS, Data(max_pixels=50_000), "tower")
BATCH, P = 8, 4
pytestmark = pytest.mark.usefixtures("no_process_is_left")


@pytest.fixture(scope="module")
def encoder(shapes: PreTrainedTokenizerBase) -> PromptEncoder:
    return PromptEncoder(shapes, Decoder(model="any", template="{question} ", instruction=""), P, 32)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """30 questions, three an image; 3 conversations, one without image; 5 captions."""
    folder = tmp_path_factory.mktemp("clean")
    sources = {"vqa": files.vqav2(folder / "v"), "talk": files.llava(folder / "t")}
    sources["pairs"] = source("captions", images=write_set(folder / "c", 5, 2))
    return mixture(**sources)


@pytest.fixture
def spoiled(tmp_path: Path) -> Mixture:
    good = [{"id": n, "image": f"{n}.jpg", "conversations": talk(f"what is {n}?", "red " * (n % 3 + 1))} for n in range(20)]
    for number in range(20):
        files.write_images(tmp_path / "images", f"{number}.jpg")
    for name, content in (("cut.jpg", jpeg(1)[:200]), ("bomb.png", bomb_png(900, 900))):
        (tmp_path / "images" / name).write_bytes(content)
    bad = [{"id": name, "image": name, "conversations": talk("what?", "red")} for name in ("cut.jpg", "bomb.png")]
    long = {"id": "long", "conversations": talk("what is there? " * 10, "red")}
    source_ = source("llava", questions=write(tmp_path / "l.json", [*good, *bad, long]), images=tmp_path / "images")
    return mixture(mine=source_)


def stream(questions: Mixture, encoder: PromptEncoder, *, eyes: ImageProcessor | None = EYES, **more: int) -> QuestionBatches:
    ranks = {"rank": 0, "world": 1, "workers": 0, "start_position": more.pop("start", 0), **more}
    return loader.question_batches(questions, question_order(questions, BATCH, seed=3), encoder, eyes, **ranks, pin_memory=False)


def take(questions: Mixture, encoder: PromptEncoder, count: int, **more: int) -> list[QuestionBatch]:
    with stream(questions, encoder, **more) as batches:
        return list(itertools.islice(batches, count))


def rows(batch: QuestionBatch) -> list[tuple[object, ...]]:
    """Each row without its padding, which depends on what else is in the batch."""
    assert batch.pixels is not None
    found = []
    for row in range(len(batch)):
        attend = batch.attend_BL[row]
        parts = [tuple(tensor[row][attend].tolist()) for tensor in (batch.ids_BL, batch.labels_BL, batch.image_mask_BL)]
        found.append((int(batch.index[row]), bool(batch.has_image[row]), batch.pixels[row].numpy().tobytes(), *parts))
    return found


def test_a_batch_has_questions_their_images_and_masks(clean: Mixture, encoder: PromptEncoder) -> None:
    for batch in take(clean, encoder, 4):
        assert batch.pixels is not None
        assert (batch.pixels.shape, batch.pixels.dtype) == ((BATCH, 3, 24, 20), torch.uint8)
        assert batch.ids_BL.shape == batch.attend_BL.shape == batch.image_mask_BL.shape == batch.labels_BL.shape
        assert batch.image_mask_BL.sum(1).tolist() == [P * seen for seen in batch.has_image.tolist()]
        assert not (batch.labels_BL != -100)[batch.image_mask_BL | ~batch.attend_BL].any()
        for row, index in enumerate(batch.index.tolist()):
            (asked,) = clean.read([index], True)
            assert batch.has_image[row] == (asked.image is not None)  # type: ignore[union-attr]
            if asked.image is not None:  # type: ignore[union-attr]
                whole = evaluation_pixels(decode(asked.image, 10**6), PREPROCESS)  # type: ignore[union-attr]
                assert torch.equal(batch.pixels[row], torch.tensor(whole)), "an image is seen whole, neither cropped nor flipped"
            else:
                assert not batch.pixels[row].any()
    assert (batch.position, batch.next_position, len(batch)) == (24, 32, 8)


def test_an_epoch_has_every_question_once_and_mixes_the_sources(clean: Mixture, encoder: PromptEncoder) -> None:
    indices = torch.cat([batch.index for batch in take(clean, encoder, 4)]).tolist()
    assert len(set(indices)) == 32
    assert {0 <= index < 30 for index in indices[:16]} == {True, False}
    assert indices != sorted(indices)


@pytest.mark.parametrize("which", ["clean", "spoiled"])
@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 1), (4, 0)])
def test_any_number_of_ranks_and_workers_gives_the_same_global_batches(request, encoder, which: str, world: int, workers: int) -> None:
    questions = request.getfixturevalue(which)
    expected = take(questions, encoder, 6)  # more than an epoch
    ranks = [take(questions, encoder, 6, rank=rank, world=world, workers=workers) for rank in range(world)]
    for step, whole in enumerate(expected):
        parts = [rank[step] for rank in ranks]
        assert [row for part in parts for row in rows(part)] == rows(whole)
        assert {(part.position, part.next_position) for part in parts} == {(whole.position, whole.next_position)}
        counts = [sum(values) for values in zip(*(part.bad.to_list() for part in parts), strict=True)]
        assert counts == whole.bad.to_list()


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_gives_the_batches_that_would_have_followed(spoiled, encoder: PromptEncoder, workers: int) -> None:
    whole = take(spoiled, encoder, 9)
    resumed = take(spoiled, encoder, 5, start=whole[3].next_position, workers=workers)
    assert [rows(batch) for batch in resumed] == [rows(batch) for batch in whole[4:]]
    assert [batch.position for batch in resumed] == [batch.position for batch in whole[4:]]


def test_bad_questions_are_replaced_counted_and_logged(spoiled: Mixture, encoder: PromptEncoder, caplog) -> None:
    batches = take(spoiled, encoder, 12, workers=2)
    assert all(index < 20 for batch in batches for index in batch.index.tolist())
    total = batches[0].bad
    for batch in batches[1:]:
        total.merge(batch.bad)
    assert set(total.counts) == {"corrupt_image", "too_large", "too_long"}
    assert total.seen == 12 * BATCH + total.total
    lines = [record.getMessage() for record in caplog.records if record.name == "megakd.data"]
    assert any("too_long: answers.train.mine: question long (43 tokens, answers.max_length = 32)" in line for line in lines)


@pytest.mark.timeout(60)
def test_questions_that_are_all_too_long_are_an_error_and_no_hang(clean: Mixture, shapes: PreTrainedTokenizerBase) -> None:
    short = PromptEncoder(shapes, Decoder(model="any"), P, 6)
    with stream(clean, short) as batches, pytest.raises(ValueError, match=r"no usable question in 64 attempts .*answers\.max_length"):
        next(batches)


def test_a_batch_without_any_image_has_pixels_of_zeros(tmp_path: Path, encoder: PromptEncoder) -> None:
    entries = [{"id": n, "conversations": talk("where is the star?", "center")} for n in range(10)]
    given = source("llava", questions=write(tmp_path / "l.json", entries))
    (batch,) = take(mixture(text=given), encoder, 1)
    assert batch.pixels is not None
    assert batch.pixels.shape == (BATCH, 3, 24, 20)
    assert not batch.pixels.any()
    assert not batch.has_image.any()
    assert not batch.image_mask_BL.any()


def test_a_decoder_without_eyes_reads_no_image(tmp_path: Path, shapes: PreTrainedTokenizerBase) -> None:
    questions = mixture(vqa=files.vqav2(tmp_path))
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    blind = PromptEncoder(shapes, Decoder(model="any"), 0, 64)
    with stream(questions, blind, eyes=None) as batches:
        batch = next(batches)
    assert batch.pixels is None
    assert not batch.has_image.any()
    assert batch.bad.total == 0


def test_impossible_settings_are_refused_before_anything_is_read(clean: Mixture, encoder: PromptEncoder) -> None:
    with pytest.raises(ValueError, match=r"answers\.batch = 8 does not divide by 3 ranks"):
        stream(clean, encoder, world=3)
    with pytest.raises(ValueError, match="start_position = -8"):
        stream(clean, encoder, start=-8)
    fewer = Mixture({"one": clean.sets["vqa"]})
    order = question_order(fewer, BATCH, 0)
    with pytest.raises(ValueError, match="the order covers 30 questions, but the sources hold 38"):
        loader.question_batches(clean, order, encoder, EYES, rank=0, world=1, start_position=0, workers=0, pin_memory=False)


def prompts(questions: Mixture, encoder: PromptEncoder, indices: range, batch: int, workers: int = 0) -> list[PromptBatch]:
    return list(loader.evaluation_questions(questions, indices, encoder, EYES, batch=batch, workers=workers, pin_memory=False))


@pytest.mark.parametrize("world", [1, 3])
def test_every_question_is_asked_once_by_some_rank_padded_on_the_left(clean: Mixture, encoder: PromptEncoder, world: int) -> None:
    asked = []
    for rank in range(world):
        for batch in prompts(clean, encoder, loader.rank_slice(len(clean), rank, world), batch=7, workers=rank):
            asked += batch.index.tolist()
            assert batch.attend_BL[:, -1].all()
            for row, question in enumerate(batch.questions):
                assert question == clean[int(batch.index[row])]
                alone = encoder.prompt(question.text, question.short, bool(batch.has_image[row]))
                assert batch.ids_BL[row][batch.attend_BL[row]].tolist() == alone.ids
    assert asked == list(range(len(clean)))


def test_what_cannot_be_asked_is_named_and_in_no_row(spoiled: Mixture, encoder: PromptEncoder) -> None:
    batches = prompts(spoiled, encoder, range(18, 23), batch=2)
    assert [batch.index.tolist() for batch in batches] == [[18, 19], [], []]
    unusable = dict(pair for batch in batches for pair in batch.unusable)
    assert list(unusable) == [20, 21, 22]
    assert unusable[21].startswith("too_large: answers.train.mine: question bomb.png: ")
    assert batches[1].pixels is not None
    assert batches[1].pixels.shape == (0, 3, 24, 20)
    assert prompts(spoiled, encoder, range(0), batch=2) == []


def test_a_batch_moves_with_all_its_tensors(clean: Mixture, encoder: PromptEncoder) -> None:
    (batch,) = take(clean, encoder, 1)
    moved = batch.to("meta", non_blocking=True)
    assert {moved.ids_BL.device.type, moved.labels_BL.device.type, moved.has_image.device.type} == {"meta"}
    assert moved.pixels is not None
    assert moved.pixels.device.type == "meta"
    assert torch.equal(moved.index, batch.index)
    (prompt,) = prompts(clean, encoder, range(3), batch=4)
    assert prompt.to("meta", non_blocking=True).ids_BL.device.type == "meta"
    assert len(prompt) == len(prompt.questions) == 3
