"""The store's format: what is written is read, what is not whole is not there, one writer at a time; and the loader that replays it."""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megakd.data.augmentation import draw_stored
from megakd.data.pictures import train_pixels
from megakd.data.shards import ShardSet
from megakd.data.store import writer
from megakd.data.store.reader import Store, StoreError, content_digest, differences, map_part, part_path, read_manifest
from megakd.data.store.views import StoredViews
from megakd.data.transforms import decode
from megakd.recipe import Views
from support import edit_json
from support.loaders import TOWERS, take
from support.processes import files_at_most, python
from support.shards import open_shards, pair, write_tar
from support.stores import KEY, LAYOUT, MANIFEST, UNUSABLE, values, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "store")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_come_back_as_they_were_written_in_any_order(tmp_path: Path, dtype: str) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    store = Store.open(write(tmp_path / "store", replace(MANIFEST, layout=layout)))
    store = pickle.loads(pickle.dumps(store))  # noqa: S301  (our own, as a worker gets it)
    image, text, _ = values(layout)
    generator = np.random.default_rng(1)
    index, view = generator.integers(0, 43, 200), generator.integers(0, 3, 200)
    rows = store.read(index, view)
    assert torch.equal(rows.image, image[index, view].to(layout.torch_dtype))
    assert torch.equal(rows.text, text[index].to(layout.torch_dtype))
    assert rows.known.tolist() == [sample not in UNUSABLE for sample in index.tolist()]
    assert store.defects == []
    assert store.manifest.scale == MANIFEST.scale


def test_parts_are_plain_safetensors_with_a_row_a_sample(folder: Path) -> None:
    found = load_file(part_path(folder, 5))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"image": (3, 3, 5), "text": (3, 5), "known": (3,)}
    assert found["known"].tolist() == [1, 1, 0]


def test_the_manifest_lists_the_parts_with_checksums_of_their_values(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    assert [(part["name"], part["first"], part["count"], part["known"]) for part in manifest.parts][-2:] == [
        ("000004.safetensors", 32, 8, 8),
        ("000005.safetensors", 40, 3, 2),
    ]
    for number, part in enumerate(manifest.parts):
        arrays = map_part(folder, manifest, number, Store.open(folder).parts[number])
        assert content_digest(arrays) == part["sha256"]


def _of_another_store(path: Path) -> bytes:
    other = write(path.parents[2] / "other", replace(MANIFEST, key={**KEY, "seed": 8}))
    return part_path(other, 1).read_bytes()


# What a part's file holds afterwards, None where it is gone, and what is said of it.
SPOILED: dict[str, tuple[Callable[[Path], bytes | None], str]] = {
    "gone": (lambda path: None, "missing"),
    "cut at its end": (lambda path: path.read_bytes()[:-1], "bytes instead of"),
    "cut in its header": (lambda path: path.read_bytes()[:20], "no part of a store"),
    "longer": (lambda path: path.read_bytes() + b"\0", "bytes instead of"),
    "empty": (lambda path: b"", "no part of a store"),
    "the next part": (lambda path: part_path(path.parents[1], 2).read_bytes(), "a part of another store"),
    "another store's": (_of_another_store, "a part of another store"),
}


@pytest.mark.parametrize(("spoil", "defect"), SPOILED.values(), ids=SPOILED)
def test_a_part_that_is_not_whole_is_not_there_and_the_others_are(folder: Path, spoil: Callable[[Path], bytes | None], defect: str) -> None:
    content = spoil(part_path(folder, 1))
    part_path(folder, 1).unlink()
    if content is not None:
        part_path(folder, 1).write_bytes(content)
    store = Store.open(folder)
    assert list(store.parts) == [0, 2, 3, 4, 5]
    assert len(store.defects) == 1
    assert store.defects[0].startswith(f"{part_path(folder, 1)}: ")
    assert defect in store.defects[0]
    rows = store.read(np.array([7, 8, 15, 16]), np.zeros(4, np.int64))
    assert rows.known.tolist() == [True, False, False, True]
    assert not rows.image[1:3].any()
    with pytest.raises(StoreError, match="1 of 6 parts are not usable"):
        store.check_whole()
    manifest = read_manifest(folder)
    assert manifest is not None
    assert writer.parts_to_do(folder, manifest) == [1]


def test_a_half_written_part_never_counts_and_is_removed_by_the_next_job(tmp_path: Path, folder: Path) -> None:
    partial = part_path(folder, 1).with_name(".000001.safetensors.abcd")
    part_path(folder, 1).rename(partial)
    assert list(Store.open(folder).parts) == [0, 2, 3, 4, 5]
    assert writer.parts_to_do(folder, MANIFEST) == [1]
    assert not partial.exists()


def test_a_part_that_vanishes_in_use_is_an_error_with_its_name(folder: Path) -> None:
    store = Store.open(folder)
    part_path(folder, 1).unlink()
    with pytest.raises(StoreError, match=r"000001\.safetensors: gone or changed since the run began"):
        store.read(np.array([8]), np.array([0]))


def test_a_full_disk_is_said_and_leaves_no_part_behind(folder: Path) -> None:
    image, text, known = values(LAYOUT)
    part_path(folder, 0).unlink()
    said = r"could not write .*000000\.safetensors: .*the parts written before are kept"
    with files_at_most(100), pytest.raises(StoreError, match=said):
        writer.write_part(folder, MANIFEST, 0, image[:8], text[:8], known[:8])
    assert sorted(path.name for path in (folder / "parts").iterdir()) == [f"{number:06d}.safetensors" for number in range(1, 6)]


def test_what_is_no_store_says_so(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(StoreError, match="no store of embeddings"):
        Store.open(tmp_path / "nothing")
    edit_json(folder / "manifest.json", format=9)
    with pytest.raises(StoreError, match="format 9, this version reads format 1"):
        Store.open(folder)
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:50])
    with pytest.raises(StoreError, match="no manifest of a store"):
        Store.open(folder)


def test_every_difference_of_the_keys_is_told_with_both_values(folder: Path) -> None:
    wanted = {**KEY, "seed": 8, "views": {"flip": 0.25, "crop_scale": [0.5, 1.0]}, "teacher": {"embed_dim": 5, "vision_cfg": {"layers": 2}}}
    with pytest.raises(StoreError) as caught:
        Store.open(folder).check_matches(wanted)
    lines = str(caught.value).splitlines()[1:-1]
    assert lines == [
        "  seed: 7 in the store, 8 in the recipe",
        "  teacher.vision_cfg.layers: None in the store, 2 in the recipe",
        "  views.flip: 0.5 in the store, 0.25 in the recipe",
    ]
    Store.open(folder).check_matches(KEY)


def test_weights_are_compared_by_checksum_and_by_name_only_without_one() -> None:
    mine = {"weights": {"name": "local-dir:here", "sha256": "1"}}
    assert differences(mine, {"weights": {"name": "local-dir:there", "sha256": "1"}}) == []
    assert len(differences(mine, {"weights": {"name": "local-dir:here", "sha256": "2"}})) == 1
    assert differences(mine, {"weights": {"name": "local-dir:here", "sha256": None}}) == []
    assert len(differences(mine, {"weights": {"name": "local-dir:there", "sha256": None}})) == 1


def test_a_job_goes_on_with_its_own_store_and_refuses_another_or_a_folder_of_other_things(tmp_path: Path, folder: Path) -> None:
    assert writer.existing(folder, KEY, MANIFEST.made, LAYOUT) == read_manifest(folder)
    for key, made, layout, said in [
        ({**KEY, "seed": 8}, MANIFEST.made, LAYOUT, "seed: 7 in the store, 8"),
        (KEY, {"precision": "bf16"}, LAYOUT, "made.precision: 'fp32' in the store, 'bf16'"),
        (KEY, MANIFEST.made, replace(LAYOUT, views=4), "layout.views: 3 in the store, 4"),
        (KEY, MANIFEST.made, replace(LAYOUT, dtype="bf16"), "layout.dtype: 'fp32' in the store, 'bf16'"),
    ]:
        with pytest.raises(StoreError, match=said):
            writer.existing(folder, key, made, layout)
    (tmp_path / "mine").mkdir()
    assert writer.existing(tmp_path / "mine", KEY, MANIFEST.made, LAYOUT) is None
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"holds thesis\.tex and no manifest\.json"):
        writer.existing(tmp_path / "mine", KEY, MANIFEST.made, LAYOUT)


HOLDER = """
import sys, time
from pathlib import Path
from megakd.data.store.writer import StoreLock
with StoreLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = python("-c", HOLDER, tmp_path / "locked", stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_job_is_refused_while_the_first_one_writes(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(StoreError, match=rf"process {holder.pid} on .* is writing this store now"):
        writer.StoreLock(tmp_path / "locked")
    holder.communicate("")
    with writer.StoreLock(tmp_path / "locked"):
        pass


def test_a_killed_jobs_lock_is_free_at_once(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with writer.StoreLock(tmp_path / "locked"):
        pass


# The loader and the teacher's side of a store


def test_every_epoch_replays_the_next_view_of_each_sample_and_brings_its_rows(clean: ShardSet, folder: Path) -> None:
    image, text, _ = values(LAYOUT)
    pictures: dict[tuple[int, int], torch.Tensor] = {}
    for batch in take(clean, 20, store=Store.open(folder)):  # four epochs of five batches: view 0 comes again in the last
        assert batch.view is not None
        assert batch.stored is not None
        assert batch.view.tolist() == [batch.position // 40 % 3] * 8
        assert torch.equal(batch.stored.image, image[batch.index, batch.view])
        assert torch.equal(batch.stored.text, text[batch.index])
        assert batch.stored.known.tolist() == [index not in UNUSABLE for index in batch.index.tolist()]
        for row, index in enumerate(batch.index.tolist()):
            place = (index, int(batch.view[row]))
            assert torch.equal(pictures.setdefault(place, batch.pixels["teacher"][row]), batch.pixels["teacher"][row])
    seen = {index for index, view in pictures if all((index, other) in pictures for other in range(3))}
    assert len(seen) > 30
    assert all(not torch.equal(pictures[index, 0], pictures[index, 1]) for index in seen)


def test_the_augmentation_of_a_stored_view_is_a_function_of_seed_sample_and_number_alone(clean: ShardSet, folder: Path) -> None:
    (batch,) = take(clean, 1, store=Store.open(folder))
    index = int(batch.index[3])
    picture = decode(clean.read(index, ("image",)).members["image"], 10**7).convert("RGB")
    expected = train_pixels(picture, draw_stored(Views(), 7, index, 0, *picture.size), TOWERS["student"].train_pixels, "pillow")
    assert torch.equal(batch.pixels["student"][3], torch.from_numpy(expected.copy()))


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 1), (4, 0)])
def test_any_number_of_ranks_and_workers_reads_the_same_rows(clean: ShardSet, folder: Path, world: int, workers: int) -> None:
    store = Store.open(folder)
    whole = take(clean, 7, store=store)
    parts = [take(clean, 7, store=store, rank=rank, world=world, workers=workers) for rank in range(world)]
    for step, expected in enumerate(whole):
        found = [part[step] for part in parts]
        assert torch.equal(torch.cat([batch.stored.image for batch in found]), expected.stored.image)
        assert torch.equal(torch.cat([batch.view for batch in found]), expected.view)
        assert torch.equal(torch.cat([batch.pixels["student"] for batch in found]), expected.pixels["student"])


def test_without_a_store_nothing_is_replayed(clean: ShardSet) -> None:
    (batch,) = take(clean, 1)
    assert batch.view is None
    assert batch.stored is None


def test_what_a_miss_reads_again_is_what_the_loader_gives_a_teacher(clean: ShardSet, folder: Path) -> None:
    source = StoredViews(clean, Views(), 7, TOWERS["teacher"])
    for batch in take(clean, 7, store=Store.open(folder)):
        pixels, tokens = source.see_all(batch.index.numpy(), batch.view.numpy())
        assert torch.equal(pixels, batch.pixels["teacher"])
        assert torch.equal(tokens, batch.tokens["teacher"])
    pixels, tokens = source.see_all(np.array([], np.int64), np.array([], np.int64))
    assert (pixels.shape, tokens.shape) == ((1, 3, 24, 20), (1, 20))


def test_samples_that_cannot_be_used_are_left_out_of_what_a_teacher_sees(tmp_path: Path) -> None:
    members = [*pair("a", 1), ("b.jpg", b"no picture"), ("b.txt", b"text"), *pair("c", 2)]
    spoiled = open_shards(str(write_tar(tmp_path / "0.tar", members)))
    source = StoredViews(spoiled, Views(), 0, TOWERS["teacher"])
    seen = source.see(np.arange(3), np.tile(np.arange(2), (3, 1)))
    assert seen.index.tolist() == [0, 2]
    assert seen.pixels.shape == (2, 2, 3, 24, 20)
    assert seen.tokens.shape == (2, 20)
    assert seen.bad.counts == {"corrupt_image": 1}
    only_bad = source.see(np.array([1]), np.array([[0]]))
    assert (len(only_bad.index), only_bad.tokens.shape) == (0, (0, 20))
    with pytest.raises(ValueError, match=r"not again for the teacher: corrupt_image: .*0\.tar: b"):
        source.see_all(np.array([1]), np.array([0]))
