"""Patch tokens in a store: read where they are asked for, checked by row, their size told before, and stores without them as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megakd.data.store import writer
from megakd.data.store.manifest import Layout, PatchLayout
from megakd.data.store.reader import Store, StoreError, part_path, read_manifest
from megakd.runtime.files import json_sha256
from support import safetensors_files
from support.stores import LAYOUT, MANIFEST, UNUSABLE, patch_values, values, write

PATCHES = PatchLayout((2, 3), {10: 4, 2: 6})
WITH_PATCHES = replace(MANIFEST, layout=replace(LAYOUT, patches=PATCHES))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "store", WITH_PATCHES)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tokens_come_back_as_they_were_written_by_the_names_asked_for(tmp_path: Path, dtype: str) -> None:
    layout = replace(WITH_PATCHES.layout, dtype=dtype)
    store = Store.open(write(tmp_path / "store", replace(MANIFEST, layout=layout)))
    image, tokens = values(layout)[0], patch_values(layout)
    generator = np.random.default_rng(1)
    index, view = generator.integers(0, 43, 200), generator.integers(0, 3, 200)
    assert all(isinstance(values, np.memmap) for name, values in store._arrays(0).items() if name != "checks")  # read row by row
    asked: list[dict[int, int]] = [{-2: 10}, {-1: 2, 10: 10, -2: 10}, {}]
    for one in asked:
        rows = replace(store, asked=one).read(index, view)
        assert torch.equal(rows.image, image[index, view].to(layout.torch_dtype))
        assert rows.known.tolist() == [sample not in UNUSABLE for sample in index.tolist()]
        assert {block: map_BhwC.shape[1:] for block, map_BhwC in rows.patches.items()} == {
            block: (2, 3, PATCHES.widths[number]) for block, number in one.items()
        }
        for block, number in one.items():
            assert torch.equal(rows.patches[block], tokens[f"patches.{number}"][index, view].to(layout.torch_dtype))


def test_a_flipped_bit_of_tokens_damages_its_own_row_and_that_where_they_are_read_alone(folder: Path) -> None:
    path, index, view = part_path(folder, 0), np.arange(3), np.ones(3, np.int64)
    header, data = safetensors_files.read(path)
    # the second sample's view 1 (of 3) of block 10: 2 x 3 tokens of width 4 in four bytes each
    place = header["patches.10"]["data_offsets"][0] + (3 + 1) * 96 + 50
    safetensors_files.write(path, header, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    store = Store.open(folder)
    for asked, sound in (({}, True), ({0: 2}, True), ({0: 10}, False), ({0: 2, 1: 10}, False)):
        rows = replace(store, asked=asked).read(index, view)
        assert rows.known.tolist() == [True, sound, True]
        assert rows.damaged.tolist() == [False, not sound, False]
        assert all(sound or not map_BhwC[1].any() for map_BhwC in rows.patches.values())
    assert replace(store, asked={0: 10}).read(index, np.zeros(3, np.int64)).known.all()


def test_blocks_that_lie_where_others_were_written_are_no_part(folder: Path) -> None:
    """Of one shape they would be read as each other."""
    alike = replace(MANIFEST, layout=replace(LAYOUT, patches=PatchLayout((2, 2), {3: 4, 5: 4})))
    other = write(folder.with_name("alike"), alike)
    header, data = safetensors_files.read(part_path(other, 0))
    header["patches.3"], header["patches.5"] = header["patches.5"], header["patches.3"]
    safetensors_files.write(part_path(other, 0), header, data)
    assert "do not lie where they were written" in Store.open(other).defects[0]


def test_a_store_without_patch_tokens_is_written_as_before(tmp_path: Path, folder: Path) -> None:
    plain = json.loads((write(tmp_path / "plain") / "manifest.json").read_text())
    assert (plain["format"], set(plain["layout"])) == (2, {"samples", "part", "views", "width", "dtype"})
    with_patches = json.loads((folder / "manifest.json").read_text())
    assert (with_patches["format"], with_patches["layout"]["patches"]) == (3, {"grid": [2, 3], "widths": {"2": 6, "10": 4}})
    assert read_manifest(folder).layout == WITH_PATCHES.layout  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change",
    [
        lambda layout: layout.update(patches=None),
        lambda layout: layout["patches"].update(grid=[2]),
        lambda layout: layout["patches"].update(grid=[0, 3]),
        lambda layout: layout["patches"].update(grid=[2, 3.0]),
        lambda layout: layout["patches"].update(widths={"x": 4}),
        lambda layout: layout["patches"].update(widths={"2": "6"}),
        lambda layout: layout["patches"].update(widths=[6]),
        lambda layout: layout["patches"].update(widths={"2": 10**9}),
    ],
)
def test_a_layout_that_cannot_be_is_refused_even_where_the_checksum_is_right(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"]
    change(content["layout"])
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": json_sha256(content)}))
    with pytest.raises(StoreError, match=r"manifest\.json: (cannot be true: layout\.patches|no manifest of a store)"):
        Store.open(folder)


def test_another_grid_or_other_blocks_are_another_store(folder: Path) -> None:
    for patches, said in (
        (PatchLayout((2, 2), PATCHES.widths), r"layout\.patches\.grid: \[2, 3\] in the store, \[2, 2\] in the recipe"),
        (PatchLayout((2, 3), {2: 6}), r"layout\.patches\.widths\.10: 4 in the store, None in the recipe"),
        (None, r"layout\.patches\.grid: \[2, 3\] in the store, None in the recipe"),
    ):
        with pytest.raises(StoreError, match=said):
            writer.existing(folder, MANIFEST.key, MANIFEST.made, replace(LAYOUT, patches=patches))


@pytest.mark.parametrize("layout", [LAYOUT, WITH_PATCHES.layout, replace(WITH_PATCHES.layout, dtype="bf16", samples=300, part=100)])
def test_the_size_told_is_that_of_the_files_but_for_their_headers(tmp_path: Path, layout: Layout) -> None:
    store = write(tmp_path / "store", replace(MANIFEST, layout=layout))
    total = sum(path.stat().st_size for path in (store / "parts").iterdir())
    told = layout.samples * layout.sample_bytes
    assert told < total < told + 1200 * layout.parts


def test_the_size_is_told_in_words() -> None:
    giant = Layout(12_800_000, 4096, 4, 1280, "bf16", PatchLayout((4, 4), {46: 1664}))
    assert str(giant) == ("12,800,000 samples, 4 views each, width 1280 and patch tokens of block 46 (width 1664) on 4 x 4, bf16: 2,891 GB")


def test_parts_with_patch_tokens_stay_small_enough_for_memory() -> None:
    giant = Layout(12_800_000, 1, 4, 1280, "bf16", PatchLayout((7, 7), {46: 1664}))
    assert 200e6 < writer.in_parts(giant).part * giant.sample_bytes <= 256 << 20
    assert writer.in_parts(replace(giant, patches=None)).part == 4096
    assert writer.in_parts(replace(giant, views=4096)).part == 1


def test_a_store_that_the_disk_has_no_room_for_is_refused(tmp_path: Path) -> None:
    layout = WITH_PATCHES.layout
    most = int(0.6 * shutil.disk_usage(tmp_path).free / layout.sample_bytes)  # samples of a part: one fits and two do not
    large = replace(layout, samples=most + most // 2, part=most)
    writer.check_room(tmp_path, large, [0])
    writer.check_room(tmp_path, large, [1])  # half a part
    with pytest.raises(
        StoreError, match=r"[\d.,]+ [kMG]B are to be written and [\d.,]+ [kMG]B are free there: make room.*a smaller teacher\.patch_grid"
    ):
        writer.check_room(tmp_path, replace(large, samples=2 * most), [0, 1])
    writer.check_room(Path("/proc"), large, [0, 1])  # a file system that does not tell
