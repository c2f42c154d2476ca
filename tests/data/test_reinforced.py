"""Shards that hold embeddings of themselves: the generator's pixels bit for bit, the rows that belong to them, and no damage that runs."""

from __future__ import annotations

import functools
import gzip
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image

from megakd.data.bad_samples import BadSample
from megakd.data.pairs import Batch
from megakd.data.reinforced import members
from megakd.data.reinforced.pairs import ReinforcedPairs
from megakd.data.reinforced.replay import OPERATIONS, recorded_image
from megakd.data.reinforced.shards import ReinforcedShards, needed
from megakd.data.shards import ShardSet
from megakd.data.store.reader import StoredRows
from megakd.data.transforms import TowerView
from megakd.recipe import Data
from support import loaders
from support.reinforced import FORMS, VIEWS, Written, gzipped, npz, npz_of, numbered, packed, plain_pairs, recorded, write_reinforced
from support.shards import ByteTokenizer, data, jpeg, no_barrier, pair, text_of, write_tar

WIDTHS = {"teacher": 4, "ensemble.b": 3}
CAPTIONS = {"txt": 0.5, "syn.json:syn_text": 0.5}
SIZE = 16  # of the student's view in `support.loaders`, too
NAMES = ("image_emb", "text_emb", "syn_text_emb")


def opened(train: str, *, widths: dict[str, int] = WIDTHS, replays: bool = True, **more: Any) -> tuple[ShardSet, ReinforcedShards]:
    shards = ShardSet.open(data(train, **{"captions": CAPTIONS, **more}), 0, 1, no_barrier, further=needed(replays))
    return shards, ReinforcedShards(shards.captions, widths, SIZE, replays).looked_at(shards)


def take(both: tuple[ShardSet, ReinforcedShards], count: int, **more: Any) -> list[Batch]:
    shards, reinforced = both
    return loaders.take(shards, count, pairs=functools.partial(ReinforcedPairs, reinforced=reinforced), **more)


def stored(batch: Batch) -> StoredRows:
    assert batch.stored is not None
    assert bool(batch.stored.known.all())
    assert not batch.stored.damaged.any()
    return batch.stored


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_reinforced(tmp_path_factory.mktemp("set"), plain_pairs(24), numbered, SIZE)


def test_further_members_are_read_by_their_extensions_and_change_nothing_of_a_set_without_them(tmp_path: Path) -> None:
    plainly = [member for number in range(3) for member in pair(f"{number}", number)]
    more = [("0.paug.json", b"zero"), ("0.url.txt", b"http://a"), ("2.pth.gz", b"two"), ("2.paug.json", b"")]
    path, further = write_tar(tmp_path / "0.tar", [*plainly, *more]), ("paug.json", "pth.gz")
    plain, rich = (ShardSet.open(data(str(path)), 0, 1, no_barrier, further=names) for names in ((), further))
    assert len(plain) == len(rich) == 3
    read = [rich.read(index, ("image", "caption", *further)).members for index in range(3)]
    assert [{name: one.get(name) for name in further} for one in read] == [
        {"paug.json": b"zero", "pth.gz": None},
        {"paug.json": None, "pth.gz": None},
        {"paug.json": b"", "pth.gz": b"two"},
    ]
    assert [one["caption"] for one in read] == [plain.read(index, ("caption",)).members["caption"] for index in range(3)]
    assert len(list(tmp_path.glob("*.npy"))) == 2  # each set has an index of its own
    write_tar(path, [*plainly, *more[:-1], ("2.paug.json", b"other")])
    assert ShardSet.open(data(str(path)), 0, 1, no_barrier).signature == plain.signature
    assert ShardSet.open(data(str(path)), 0, 1, no_barrier, further=further).signature != rich.signature


def test_a_replayed_view_has_the_generators_pixels_to_the_last_bit() -> None:
    image = recorded_image(jpeg(5, (90, 70)), Data())
    seen = set()
    for seed in range(60):
        parameters, picture = recorded(image, 56, seed)
        (view,) = members.augmentations(str({"param_aug": [parameters]}).replace("'", '"').encode())
        assert np.array_equal(view.pixels(image, (56, 56, Image.Resampling.BICUBIC), 56), np.array(picture).transpose(2, 0, 1))
        seen |= {OPERATIONS[number] for number, _ in parameters[1]}
    assert seen == set(OPERATIONS)


def test_shifts_are_the_same_part_of_the_picture_at_another_size_and_whole_pixels_stay_whole() -> None:
    assert int(1 / 49 * 49) == 0
    image = recorded_image(jpeg(5, (49, 49)), Data())
    for pixels in range(1, 40):
        (view,) = members.augmentations(b'{"param_aug": [[[0, 0, 49, 49], [[3, %d.0]]]]}' % pixels)
        small = view.pixels(image, (49, 49, Image.Resampling.BICUBIC), 49)
        assert (small[:, :, :pixels] == 0).all()
        assert (small[:, :, pixels] != 0).any()
        large = view.pixels(image, (98, 98, Image.Resampling.BICUBIC), 49)
        assert (large[:, :, : 2 * pixels] == 0).all()
        assert (large[:, :, 2 * pixels] != 0).any()


def test_the_image_is_neither_turned_nor_laid_on_white() -> None:
    """Crops are counted in the pixels that the generator decoded."""
    turned = Image.new("RGB", (30, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=exif)
    assert recorded_image(file.getvalue(), Data()).size == (30, 20)
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(file, "PNG")
    assert recorded_image(file.getvalue(), Data()).getpixel((0, 0)) == (10, 20, 30)


def test_a_view_may_lack_operations_and_have_a_flip() -> None:
    image = recorded_image(jpeg(3, (20, 20)), Data())
    plain, mirrored = members.augmentations(b'{"param_aug": [[[2, 3, 10, 12], null], [[2, 3, 10, 12], true, []]]}')
    view = (20, 20, Image.Resampling.BICUBIC)
    assert np.array_equal(mirrored.pixels(image, view, 20), plain.pixels(image, view, 20)[:, :, ::-1])


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"{}", b'{"param_aug": []}', b'{"param_aug": "["}', b'{"param_aug": [[[0, 0, 5]]]}',
        b'{"param_aug": [[[0, -1, 5, 5], []]]}', b'{"param_aug": [[[0, 0, 0, 5], []]]}', b'{"param_aug": [[[0.5, 0, 5, 5], []]]}',
        b'{"param_aug": [[[0, 0, 5, 5], [[14, 0.1]]]]}',
        b'{"param_aug": [[[0, 0, 5, 5], [[1, NaN]]]]}', b'{"param_aug": [[[0, 0, 5, 5], [[1, "a"]]]]}',
        b'{"param_aug": [[[0, 0, 5, 5], 7]]}',
        b'{"param_aug": ' + b"[" * 100_000, b'{"param_aug": 3}', b"\xff\xfe", b'{"param_aug": [null]}',
    ],
)  # fmt: skip
def test_augmentations_of_another_form_are_bad(content: bytes) -> None:
    with pytest.raises(BadSample) as bad:
        members.augmentations(content)
    assert bad.value.reason == "bad_embedding"
    assert ".paug.json" in bad.value.detail


def test_a_crop_outside_of_the_image_tells_of_another_image() -> None:
    (view,) = members.augmentations(b'{"param_aug": [[[0, 15, 10, 10], []]]}')
    with pytest.raises(BadSample, match=r"\[0, 15, 10, 10\] of .paug.json is outside of 20 x 20 pixels: it is of another image"):
        view.pixels(recorded_image(jpeg(3, (20, 20)), Data()), (8, 8, Image.Resampling.BICUBIC), 8)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_members_has_the_same_rows(form: Any, tmp_path: Path, written: Written) -> None:
    other = write_reinforced(tmp_path, plain_pairs(24), numbered, SIZE, form=form)
    one, expected = take(opened(other.pattern), 1)[0], take(opened(written.pattern), 1)[0]
    tolerance = 0.02 if form == "bf16" else 1e-6
    torch.testing.assert_close(stored(one).image, stored(expected).image, atol=tolerance, rtol=0)
    torch.testing.assert_close(stored(one).text, stored(expected).text, atol=tolerance, rtol=0)


def test_fp32_counts_where_a_sample_has_both_members() -> None:
    rows, other = numbered(torch.zeros((2, 3, 4, 4)), ["a"]), numbered(torch.ones((2, 3, 4, 4)), ["b"])
    found = members.embeddings(packed(*rows)["npz"], packed(*other, "bf16")["pth.gz"], NAMES)
    assert torch.equal(found["image_emb"], rows[0])


class _Runs:
    """What a pickle would do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was_run",)


def _damaged() -> dict[str, tuple[bytes | None, bytes | None]]:
    rows = {"image_emb": torch.zeros(3, 7), "text_emb": torch.zeros(3, 7)}
    arrays = {name: value.numpy() for name, value in rows.items()}
    whole, header = npz(**arrays), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 7)})
    small = npz_of(image_emb=header.getvalue() + bytes(64), text_emb=header.getvalue())
    torch_bytes = gzipped(rows)
    return {
        "no member": (None, None),
        "cut npz": (whole[: len(whole) // 2], None),
        "flipped byte": (whole[:200] + bytes([whole[200] ^ 255]) + whole[201:], None),
        "no zip": (b"nothing", None),
        "objects": (npz(image_emb=np.array([_Runs()], dtype=object), text_emb=arrays["text_emb"]), None),
        "integers": (npz(image_emb=np.zeros((3, 7), int), text_emb=arrays["text_emb"]), None),
        "a header that lies": (small, None),
        "zip bomb": (npz_of(image_emb=bytes(members.LARGEST + 1), text_emb=b""), None),
        "an array is missing": (npz(image_emb=arrays["image_emb"]), None),
        "one dimension": (npz(image_emb=arrays["image_emb"][0], text_emb=arrays["text_emb"]), None),
        "unlike widths": (npz(image_emb=arrays["image_emb"][:, :5], text_emb=arrays["text_emb"]), None),
        "no rows": (npz(image_emb=arrays["image_emb"][:0], text_emb=arrays["text_emb"]), None),
        "cut gzip": (None, torch_bytes[:-20]),
        "no gzip": (None, b"nothing"),
        "gzip bomb": (None, gzip.compress(bytes(members.LARGEST + 1), 1)),
        "code": (None, gzipped(_Runs())),
        "code inside": (None, gzipped({**rows, "more": _Runs()})),
        "older torch": (None, gzipped(rows, _use_new_zipfile_serialization=False)),
        "a pickle": (None, gzip.compress(pickle.dumps(_Runs()))),
        "a list": (None, gzipped([rows["image_emb"]])),
        "no tensor": (None, gzipped({**rows, "text_emb": [1.0]})),
        "expanded": (None, gzipped({**rows, "text_emb": torch.zeros(1).expand(1 << 24, 7)})),
        "sparse": (None, gzipped({**rows, "text_emb": torch.zeros(3, 7).to_sparse()})),
    }


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("kind", _damaged())
def test_damage_is_a_bad_sample_and_runs_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadSample) as bad:
        members.embeddings(*_damaged()[kind], NAMES)
    assert bad.value.reason == ("missing_embedding" if kind == "no member" else "bad_embedding")
    assert list(tmp_path.iterdir()) == []


def test_a_row_belongs_to_the_view_and_the_caption_that_are_shown(written: Written) -> None:
    views, sources = set(), set()
    for batch in take(opened(written.pattern), 9):
        assert batch.view is not None
        for row, (index, view) in enumerate(zip(batch.index.tolist(), batch.view.tolist(), strict=True)):
            assert torch.equal(batch.pixels["student"][row], written.pictures[index][view])
            texts = [text[:20].strip() for text in written.texts[index]]
            number = texts.index(text_of(batch.tokens["teacher"][row]).strip())
            torch.testing.assert_close(stored(batch).image[row], written.images[index][view], atol=1e-6, rtol=0)
            torch.testing.assert_close(stored(batch).text[row], written.rows[index][number], atol=1e-6, rtol=0)
            views.add(view)
            sources.add(number)
    assert (views, sources) == (set(range(VIEWS)), {0, 1, 2})


def test_draws_are_equal_for_any_ranks_and_workers_and_where_a_run_goes_on(written: Written) -> None:
    both = opened(written.pattern)
    whole = take(both, 4)
    ranks = [take(both, 4, rank=rank, world=2) for rank in range(2)]
    resumed = take(both, 2, start=2 * loaders.BATCH, workers=1)
    for number, batch in enumerate(whole):
        halves = [one[number] for one in ranks]
        for same in [batch, resumed[number - 2]] if number >= 2 else [batch]:
            assert torch.equal(batch.pixels["student"], same.pixels["student"])
            assert torch.equal(batch.tokens["student"], same.tokens["student"])
            assert torch.equal(stored(batch).text, stored(same).text)
        for column in ("image", "text"):
            assert torch.equal(getattr(stored(batch), column), torch.cat([getattr(stored(half), column) for half in halves]))
        assert torch.equal(batch.pixels["teacher"], torch.cat([half.pixels["teacher"] for half in halves]))
    assert not torch.equal(stored(whole[0]).image, stored(whole[3]).image)


def test_texts_alone_need_no_augmentations_and_leave_images_freshly_augmented(tmp_path: Path, written: Written) -> None:
    def without(_: int, members: dict[str, bytes]) -> dict[str, bytes]:
        return {name: content for name, content in members.items() if name != "paug.json"}

    other = write_reinforced(tmp_path, plain_pairs(24), numbered, SIZE, change=without)
    texts = take(opened(other.pattern, replays=False), 2)
    shards = ShardSet.open(data(written.pattern, captions=CAPTIONS), 0, 1, no_barrier)
    for batch, plain in zip(texts, loaders.take(shards, 2), strict=True):
        assert torch.equal(batch.pixels["student"], plain.pixels["student"])
        assert torch.equal(batch.tokens["student"], plain.tokens["student"])
        stored(batch)


def test_damaged_samples_are_counted_by_reason_and_replaced(tmp_path: Path) -> None:
    def change(number: int, own: dict[str, bytes]) -> dict[str, bytes]:
        taken = {2: "npz", 3: "paug.json"}.get(number)
        own = {name: content for name, content in own.items() if name != taken}
        if number == 4:
            own["npz"] = own["npz"][:100]
        if number == 5:
            own |= packed(*(2 * rows for rows in numbered(torch.zeros((VIEWS, 3, 2, 2)), ["a", "b", "c"])))
        if number == 6:
            own |= packed(*numbered(torch.zeros((VIEWS + 1, 3, 2, 2)), ["a", "b", "c"]))
        if number == 7:
            own |= packed(*numbered(torch.zeros((VIEWS, 3, 2, 2)), ["a", "b"]))
        if number == 8:
            own["jpg"] = jpeg(8, (5, 4))
        return own

    pattern = write_reinforced(tmp_path, plain_pairs(24), numbered, SIZE, change=change).pattern
    counts: dict[str, int] = {}
    told = ""
    for batch in take(opened(pattern), 3):  # an epoch
        stored(batch)
        for reason, count in batch.bad.counts.items():
            counts[reason] = counts.get(reason, 0) + count
        told += " ".join(batch.bad.examples.values())
    assert set(counts) == {"missing_embedding", "bad_embedding"}
    assert counts["missing_embedding"] >= 2
    assert counts["bad_embedding"] >= 5
    assert "00000.tar: 00000" in told


def test_what_no_sample_holds_is_refused_before_a_run(tmp_path: Path, written: Written) -> None:
    with pytest.raises(ValueError, match=r"none of 16 samples .*rows of 7 numbers, where teacher 4 \+ ensemble.b 4 are 8.*name the models"):
        opened(written.pattern, widths={"teacher": 4, "ensemble.b": 4})
    plain = write_tar(tmp_path / "0.tar", [(f"{n}.{kind}", value) for n in range(3) for kind, value in (("jpg", jpeg(n)), ("txt", b"a"))])
    with pytest.raises(
        ValueError, match=r"missing_embedding: .*Wanted are .paug.json and .npz \(or .pth.gz\).*joined by the samples' names"
    ):
        opened(str(plain), captions={"txt": 1.0})
    with pytest.raises(ValueError, match=r"hold no embeddings of 'json:uid'.*such as 'syn.json:syn_text'"):
        opened(written.pattern, captions={"txt": 0.5, "json:uid": 0.5})


def test_the_outline_says_what_is_there(written: Written) -> None:
    _, reinforced = opened(written.pattern)
    assert reinforced.outline() == (
        "teachers' embeddings from the shards of data.train: teacher columns 0 to 3, ensemble.b columns 4 to 6; of 16 samples looked at "
        "each has 3 augmentations and 3 captions (.npz)"
    )


def test_one_caption_alone_is_read_where_one_is_asked_for(written: Written) -> None:
    for captions, number in (({"txt": 1.0}, 0), ({"syn.json:syn_text": 1.0}, None)):
        (batch,) = take(opened(written.pattern, captions=captions), 1)
        for row, index in enumerate(batch.index.tolist()):
            rows = written.rows[index][:1] if number == 0 else written.rows[index][1:]
            assert any(torch.allclose(stored(batch).text[row], expected, atol=1e-6) for expected in rows)


def test_a_blank_synthetic_caption_is_never_drawn_and_moves_no_row(tmp_path: Path) -> None:
    def change(number: int, own: dict[str, bytes]) -> dict[str, bytes]:
        return {**own, "syn.json": b'{"syn_text": [" ", "kept"]}'}

    other = write_reinforced(tmp_path, plain_pairs(12), numbered, SIZE, change=change)
    (batch,) = take(opened(other.pattern, captions={"syn.json:syn_text": 1.0}), 1)
    for row, index in enumerate(batch.index.tolist()):
        torch.testing.assert_close(stored(batch).text[row], other.rows[index][2], atol=1e-6, rtol=0)
        assert text_of(batch.tokens["teacher"][row]) == "kept"


def test_a_view_of_a_tower_of_another_filter_is_resized_by_it() -> None:
    (view,) = members.augmentations(b'{"param_aug": [[[0, 0, 20, 20], []]]}')
    image = recorded_image(jpeg(3, (20, 20)), Data())
    for name, resample in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        size = TowerView(PreprocessCfg(size=(12, 10), interpolation=name), ByteTokenizer(4)).train_pixels
        assert np.array_equal(view.pixels(image, size, 20), np.asarray(image.resize((10, 12), resample)).transpose(2, 0, 1))


def test_a_mixture_may_have_sources_of_several_forms(tmp_path: Path, written: Written) -> None:
    other = write_reinforced(tmp_path, plain_pairs(16), numbered, SIZE, form="bf16")
    train = {"twelve": {"shards": written.pattern, "weight": 1.0}, "bf16": {"shards": other.pattern, "weight": 1.0}}
    settings = Data.model_validate({"train": train, "captions": CAPTIONS})
    shards = ShardSet.open(settings, 0, 1, no_barrier, further=needed(replays=True))
    both = shards, ReinforcedShards(shards.captions, WIDTHS, SIZE, replays=True).looked_at(shards)
    assert "(.npz, .pth.gz)" in both[1].outline()
    for batch in take(both, 3):
        rows = stored(batch)
        assert batch.view is not None
        for row, (index, view) in enumerate(zip(batch.index.tolist(), batch.view.tolist(), strict=True)):
            own = written.images[index] if index < 24 else other.images[index - 24]
            torch.testing.assert_close(rows.image[row], own[view], atol=0.02, rtol=0)
