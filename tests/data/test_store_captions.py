"""A store with several captions of each sample: every one is read by its number, and a changed one is found."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megakd.data.store import writer
from megakd.data.store.manifest import Layout, read_manifest
from megakd.data.store.reader import Store, StoreError, content_digest, map_part, part_path
from support.stores import KEY, MANIFEST, UNUSABLE, values, without_checks, write

SAMPLES = 43
COUNTS = torch.tensor([0 if index in UNUSABLE else 1 + index % 5 for index in range(SAMPLES)])
FIRST = [0, *COUNTS.cumsum(0).tolist()]


def texts(layout: Layout) -> torch.Tensor:
    """(T, D) of all captions, one sample's after the other's."""
    return torch.randn((int(COUNTS.sum()), layout.width), generator=torch.Generator().manual_seed(3)).to(layout.torch_dtype)


def written(folder: Path, dtype: str = "fp32") -> Path:
    manifest = replace(MANIFEST, layout=replace(MANIFEST.layout, captions=2, dtype=dtype))
    writer.start(folder, manifest)
    image, _, known = values(manifest.layout)
    text = texts(manifest.layout)
    for number in range(manifest.layout.parts):
        rows = slice(number * manifest.layout.part, min(SAMPLES, (number + 1) * manifest.layout.part))
        of_part = text[FIRST[rows.start] : FIRST[rows.stop]]
        writer.write_part(folder, manifest, number, image[rows], of_part, known[rows], {}, COUNTS[rows])
    writer.finish(folder, manifest)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return written(tmp_path / "store")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_caption_of_every_sample_is_read_by_its_number(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "s").mkdir()
    store = Store.open(written(tmp_path / "s", dtype))
    assert not store.defects
    text, image = texts(store.layout), values(store.layout)[0]
    index = np.repeat(np.arange(SAMPLES), COUNTS.numpy())
    number = np.concatenate([np.arange(count) for count in COUNTS.tolist()])
    rows = store.read(index, index % 3, number)
    assert rows.known.all()
    assert torch.equal(rows.text, text)
    assert torch.equal(rows.image, image[index, index % 3].to(rows.image.dtype))
    assert torch.equal(store.read(index, index % 3).text, text[np.array(FIRST)[index]])  # the first of each
    gone = store.read(np.array(UNUSABLE), np.zeros(3, np.int64))
    assert not gone.known.any()
    assert not gone.damaged.any()


def test_a_caption_beyond_a_samples_own_is_no_row(folder: Path) -> None:
    rows = Store.open(folder).read(np.array([0, 4]), np.zeros(2, np.int64), np.array([1, 4]))
    assert (rows.known.tolist(), rows.damaged.tolist()) == ([False, True], [True, False])


def test_a_changed_text_is_damaged_alone_and_a_changed_number_of_captions_is_a_defect(folder: Path) -> None:
    store = Store.open(folder)
    path, facts = part_path(folder, 1), store.parts[1]
    data = bytearray(path.read_bytes())
    at = facts.offsets["text"] + (FIRST[9 + 1] - 1 - FIRST[8]) * store.layout.width * 4  # the last caption of sample 9
    data[at] ^= 1
    path.write_bytes(data)
    rows = Store.open(folder).read(np.array([9, 9, 9]), np.zeros(3, np.int64), np.array([3, 4, 0]))
    assert rows.damaged.tolist() == [False, True, False]
    changed = Store.open(folder)
    assert content_digest(map_part(folder, changed.manifest, 1, changed.parts[1])) != facts.sha256
    data[facts.offsets["captions"]] += 1
    path.write_bytes(data)
    assert ["000001.safetensors: which of its samples" in defect for defect in Store.open(folder).defects] == [True]


def test_numbers_of_captions_that_were_swapped_are_damage(folder: Path) -> None:
    facts, path = Store.open(folder).parts[0], part_path(folder, 0)
    data = bytearray(path.read_bytes())
    one, other = facts.offsets["captions"], facts.offsets["captions"] + 4
    data[one : one + 4], data[other : other + 4] = data[other : other + 4], data[one : one + 4]
    path.write_bytes(data)
    assert Store.open(folder).read(np.array([0, 1, 2]), np.zeros(3, np.int64)).damaged.tolist() == [True, True, False]


def test_stores_of_one_caption_are_written_and_read_as_before(tmp_path: Path, folder: Path) -> None:
    assert (read_manifest(folder).to_json()["format"], Store.open(folder).layout.captions) == (4, 2)
    plain = write(tmp_path / "plain")
    assert read_manifest(plain).to_json()["format"] == 2
    assert "captions" not in read_manifest(plain).to_json()["layout"]
    expected = values(MANIFEST.layout)[1]
    assert torch.equal(Store.open(plain).read(np.arange(SAMPLES), np.zeros(SAMPLES, np.int64)).text, expected)
    without_checks(plain)  # of format 1
    assert torch.equal(Store.open(plain).read(np.arange(SAMPLES), np.zeros(SAMPLES, np.int64), np.zeros(SAMPLES, np.int64)).text, expected)


def test_the_room_that_is_asked_for_counts_a_caption_of_each_source() -> None:
    one, two = MANIFEST.layout, replace(MANIFEST.layout, captions=2)
    assert two.sample_bytes - one.sample_bytes >= 4 * one.width
    assert "with every caption (of 2 sources, counted as one of each)" in str(two)
    assert "caption" not in str(one)


def test_another_policy_is_told_by_source(folder: Path) -> None:
    mine = {**KEY, "data": {"captions": {"txt": 0.5, "json:re": 0.5}}}
    writer.start(folder, replace(read_manifest(folder), key=mine))
    with pytest.raises(StoreError) as caught:
        Store.open(folder).check_matches({**KEY, "data": {"captions": {"txt": 0.75, "json:re": 0.25}, "clean": ["urls"]}})
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == [
        "data.captions.json:re: 0.5 in the store, 0.25 in the recipe",
        "data.captions.txt: 0.5 in the store, 0.75 in the recipe",
        "data.clean: None in the store, ['urls'] in the recipe",
    ]
