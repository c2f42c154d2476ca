"""The evaluation loader: every sample once, split over ranks, with the fields that were asked for."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from megakd.data.evaluation import EvaluationBatch, Field, evaluation_batches
from megakd.data.shards import ShardSet
from megakd.data.transforms import TowerView, normalise
from support.shards import ByteTokenizer, data, jpeg, no_barrier, text_of, write_set, write_tar

VIEW = TowerView(PreprocessCfg(size=16), ByteTokenizer(20))
ALL: tuple[Field, ...] = ("pixels", "tokens", "captions", "json")


def open_set(pattern: str) -> ShardSet:
    return ShardSet.open_set(pattern, data("unused"), 0, 1, no_barrier)


def batches(
    shards: ShardSet, rank: int = 0, world: int = 1, workers: int = 0, batch: int = 4, fields: tuple[Field, ...] = ALL
) -> list[EvaluationBatch]:
    stream = evaluation_batches(shards, VIEW, rank=rank, world=world, batch=batch, fields=fields, workers=workers, pin_memory=False)
    return list(stream)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (3, 0), (3, 1), (20, 0)])
def test_every_sample_comes_once_and_in_order_over_the_ranks(tmp_path: Path, world: int, workers: int) -> None:
    shards = open_set(write_set(tmp_path, 13, 2))
    found = [batch for rank in range(world) for batch in batches(shards, rank, world, workers)]
    assert torch.cat([batch.index for batch in found]).tolist() == list(range(13))
    assert [text for batch in found for text in batch.captions or []] == [f"caption {number}" for number in range(13)]
    assert [text_of(row) for batch in found for row in batch.tokens] == [f"caption {number}" for number in range(13)]
    assert [value for batch in found for value in batch.json or []] == [{"number": number} for number in range(13)]
    assert multiprocessing.active_children() == []


def test_pixels_are_those_of_open_clip(tmp_path: Path) -> None:
    import io

    (batch,) = batches(open_set(write_set(tmp_path, 3, 1)), fields=("pixels",))
    assert batch.tokens is None
    assert batch.captions is None
    assert batch.json is None
    assert batch.cls is None
    transform = image_transform_v2(VIEW.preprocess, is_train=False)
    expected = torch.stack([transform(Image.open(io.BytesIO(jpeg(number)))) for number in range(3)])
    torch.testing.assert_close(normalise(batch.pixels, VIEW.preprocess, torch.float32), expected, atol=1e-5, rtol=1e-5)


def test_zero_shot_sets_have_classes_and_need_no_captions(tmp_path: Path) -> None:
    members = [member for number in range(5) for member in ((f"{number}.jpg", jpeg(number)), (f"{number}.cls", b"%d\n" % (number % 3)))]
    (batch, last) = batches(open_set(str(write_tar(tmp_path / "0.tar", members))), fields=("pixels", "cls"))
    assert batch.cls.tolist() == [0, 1, 2, 0]
    assert last.cls.tolist() == [1]
    assert last.bad.total == 0


def test_bad_samples_are_left_out_counted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [("a.jpg", jpeg(0)), ("a.txt", b"a"), ("b.jpg", b"x"), ("b.txt", b"b")]
    members += [("c.jpg", jpeg(2)), ("d.jpg", jpeg(3)), ("d.txt", b"d")]
    shards = open_set(str(write_tar(tmp_path / "0.tar", members)))
    (batch,) = batches(shards, fields=("pixels", "tokens"))
    assert batch.index.tolist() == [0, 3]
    assert batch.pixels.shape[0] == batch.tokens.shape[0] == 2
    assert batch.bad.counts == {"corrupt_image": 1, "missing_caption": 1}
    assert batch.bad.seen == 4
    assert "0.tar: b" in caplog.text
    first, second = batches(shards, fields=("pixels",), batch=2)
    assert first.index.tolist() == [0]
    assert second.index.tolist() == [2, 3]


def test_a_batch_of_bad_samples_alone_is_empty(tmp_path: Path) -> None:
    members = [("a.jpg", b"x"), ("a.txt", b"b"), ("a.cls", b"1"), ("a.json", b"{}")]
    (batch,) = batches(open_set(str(write_tar(tmp_path / "0.tar", members))), fields=(*ALL, "cls"))
    assert len(batch) == 0
    assert batch.pixels.shape == (0, 3, 16, 16)
    assert batch.captions == []
    assert batch.bad.total == 1


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (None, r"0\.tar: a has no \.json member"),
        (b"{", r"0\.tar: a: its \.json member cannot be read"),
        (b"[1]", r"holds a list, not a dict"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_or_broken_label_is_an_error_that_names_the_sample(tmp_path: Path, member: bytes | None, said: str, workers: int) -> None:
    members = [("a.jpg", jpeg(0)), *([("a.json", member)] if member is not None else [])]
    with pytest.raises(ValueError, match=said):
        batches(open_set(str(write_tar(tmp_path / "0.tar", members))), fields=("pixels", "json"), workers=workers)
    assert multiprocessing.active_children() == []


def classed(folder: Path, content: bytes) -> str:
    return str(write_tar(folder / "0.tar", [("a.jpg", jpeg(0)), ("a.cls", content)]))


@pytest.mark.parametrize("content", [b"7", b"7\n", b" 7\r\n", b"\xef\xbb\xbf7", b"007"])
def test_a_class_is_a_number_in_digits(tmp_path: Path, content: bytes) -> None:
    (batch,) = batches(open_set(classed(tmp_path, content)), fields=("pixels", "cls"))
    assert batch.cls.tolist() == [7]


@pytest.mark.parametrize(
    "content", [b"", b"cat", b"-1", b"7.0", b"1_0", "٣".encode(), b"9" * 30, b"9" * 9999, b"7\0", b"\x80\x03K\x07.", b"[7]"]
)
def test_anything_else_is_told_what_a_class_is(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"0\.tar: a: its \.cls member cannot be read: ") as found:
        batches(open_set(classed(tmp_path, content)), fields=("pixels", "cls"))
    assert "written in digits, from 0" in str(found.value) or "utf-8" in str(found.value)
    assert len(str(found.value)) < 400 + len(str(tmp_path))


def test_what_is_sound_in_a_bad_sample_comes_along(tmp_path: Path) -> None:
    members = [("a.jpg", b"x"), ("a.txt", b"b"), ("a.json", b'{"n": 1}'), ("b.jpg", jpeg(0)), ("b.json", b"{")]
    (batch,) = batches(open_set(str(write_tar(tmp_path / "0.tar", members))), fields=("captions", "content", "json"))
    first, second = batch.unreadable
    assert (first.sample, first.content, first.caption, first.json) == (0, None, "b", {"n": 1})
    assert (second.sample, second.caption, second.json) == (1, None, None)
    (whole,) = batches(open_set(str(write_tar(tmp_path / "1.tar", [("c.jpg", jpeg(0)), ("c.txt", b"c")]))), fields=("captions", "content"))
    assert tuple(whole.content[0].tolist()) == second.content


def test_leaving_the_loop_early_ends_the_workers(tmp_path: Path) -> None:
    shards = open_set(write_set(tmp_path, 13, 2))
    stream = evaluation_batches(shards, VIEW, rank=0, world=1, batch=2, fields=ALL, workers=2, pin_memory=False)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()  # what a for loop's end or an exception does to a generator
    assert multiprocessing.active_children() == []


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose among pixels, tokens, captions, json, cls"):
        batches(open_set(write_set(tmp_path, 3, 1)), fields=("pixles",))  # type: ignore[arg-type]
