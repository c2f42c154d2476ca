"""A store's checksums: flipped bits, changed manifests, and stores of earlier versions, which had none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megakd.data.store.reader import Store, StoreError, part_path
from support import edit_json, safetensors_files
from support.stores import without_checks, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "store")


def _flip(path: Path, tensor: str, byte: int, bit: int) -> None:
    """One bit of a part's tensor."""
    header, data = safetensors_files.read(path)
    place = header[tensor]["data_offsets"][0] + byte
    safetensors_files.write(path, header, data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])


@pytest.mark.parametrize("formerly", [False, True])
@pytest.mark.parametrize("bit", [0, 6, 7])  # the last bit of a mantissa as well as a sign or an exponent
def test_one_flipped_bit_makes_a_row_one_that_the_store_lacks(folder: Path, bit: int, formerly: bool) -> None:
    if formerly:
        without_checks(folder)
    whole, index = Store.open(folder), np.arange(3)
    truth = whole.read(index, np.ones(3, np.int64))
    for name in ("image", "text"):
        path = part_path(folder, 0)
        before = path.read_bytes()
        # the second sample's text, or its view 1 (of 3), of width 5 in four bytes each
        _flip(path, name, {"image": (3 + 1) * 20, "text": 20}[name] + 3, bit)
        found = Store.open(folder).read(index, np.ones(3, np.int64))
        # a part without checks of its rows is believed as a whole or not at all
        expected = truth.known & (torch.zeros(3, dtype=torch.bool) if formerly else torch.tensor([True, False, True]))
        assert found.known.tolist() == expected.tolist()
        assert found.damaged.any()
        assert found.image[found.known].equal(truth.image[found.known])
        assert not found.image[~found.known].any()
        path.write_bytes(before)


def test_a_store_of_an_earlier_version_is_read_as_it_was(folder: Path) -> None:
    index, view = np.arange(12), np.zeros(12, np.int64)
    now = Store.open(folder).read(index, view)
    without_checks(folder)
    then = Store.open(folder)
    assert then.defects == []
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(then.read(index, view)[:4], now[:4], strict=True))


@pytest.mark.parametrize("change", [{"scale": 112.03}, {"bias": -1.0}, {"layout": {}}, {"parts": []}, {"key": {"seed": 4}}], ids=str)
def test_a_changed_manifest_is_refused(folder: Path, change: dict[str, object]) -> None:
    edit_json(folder / "manifest.json", **change)
    with pytest.raises(StoreError, match="was changed after it was written"):
        Store.open(folder)


@pytest.mark.parametrize("scale", [-1.0, 10**400, "14"])
def test_a_scale_that_cannot_be_is_refused_where_no_checksum_tells(folder: Path, scale: object) -> None:
    without_checks(folder)
    edit_json(folder / "manifest.json", scale=scale)
    with pytest.raises(StoreError, match="cannot be true: scale = "):
        Store.open(folder)
