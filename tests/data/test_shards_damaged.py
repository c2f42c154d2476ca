"""Shards with damage, links, holes and odd keys: what can be read is read, what is lost is counted by samples, and said at every start."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megakd.data import tar_index
from megakd.data.bad_samples import BadSample
from megakd.data.shards import ShardSet
from support.shards import data, jpeg, no_barrier, open_shards, pair, write_tar


def open_set(*paths: Path, rank: int = 0) -> ShardSet:
    names = [str(path) for path in paths]
    return ShardSet.open_set(names, data(names), rank, 1, no_barrier)


def numbers(shards: ShardSet) -> list[int]:
    """Of the captions; each image is that of its caption."""
    found = []
    for index in range(len(shards)):
        members = shards.read(index, ("image", "caption")).members
        found.append(int(members["caption"].split()[-1]))
        assert members["image"] == jpeg(found[-1])
    return found


def whole(path: Path, count: int = 6, first: int = 0) -> Path:
    return write_tar(path, [member for number in range(first, first + count) for member in pair(f"{number:06d}", number)])


def header_of(path: Path, name: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def spoil(path: Path, place: int, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(new)


def add(path: Path, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size, info.type, info.linkname = len(content), kind, target
        tar.addfile(info, io.BytesIO(content))


def test_one_damaged_header_costs_its_own_sample_and_no_more(tmp_path: Path) -> None:
    path = whole(tmp_path / "0.tar")
    spoil(path, header_of(path, "000002.txt") + 3, b"\xff")
    shards = open_set(path)
    assert numbers(shards) == [0, 1, 3, 4, 5]
    assert shards.known_bad.counts == {"truncated_tar": 1}
    assert shards.known_bad.seen == 6


def test_zeros_over_headers_are_no_end_and_what_they_cover_is_counted(tmp_path: Path) -> None:
    path = whole(tmp_path / "0.tar", 9)
    start, end = header_of(path, "000003.jpg"), header_of(path, "000005.jpg")
    spoil(path, start, bytes(end - start))
    shards = open_set(path)
    assert numbers(shards) == [0, 1, 2, 5, 6, 7, 8]
    assert shards.known_bad.counts == {"truncated_tar": 2}


def test_tars_appended_to_each_other_are_read_to_the_last(tmp_path: Path) -> None:
    path, more = whole(tmp_path / "0.tar", 3), whole(tmp_path / "1.tar", 4, first=3)
    path.write_bytes(path.read_bytes() + more.read_bytes())
    path.write_bytes(path.read_bytes() + write_tar(tmp_path / "2.tar", [*pair("7", 7)[:2], *pair("8", 8)[:2]]).read_bytes())  # no .json
    shards = open_set(path)
    assert numbers(shards) == list(range(9))
    assert shards.known_bad.total == 0


def test_a_flipped_byte_behind_the_end_makes_the_hole_before_it_no_larger(tmp_path: Path) -> None:
    path = whole(tmp_path / "0.tar", 3)
    spoil(path, header_of(path, "000002.json"), b"\xff")
    spoil(path, path.stat().st_size - 600, b"\x01")
    assert open_set(path).known_bad.counts == {"truncated_tar": 1}


@pytest.mark.parametrize(("end", "kept"), [("000005.txt", [0, 1, 2, 6, 7, 8]), ("000005.jpg", [0, 1, 2, 5, 6, 7, 8])])
def test_zeros_that_look_like_the_end_of_an_archive_are_damage_where_the_samples_beside_them_tell_of_it(
    tmp_path: Path, end: str, kept: list[int]
) -> None:
    members = [member for number in range(9) for member in pair(f"{number:06d}", number)]
    before = -(header_of(write_tar(tmp_path / "0.tar", members), end) + 512) % 10240
    path = write_tar(tmp_path / "1.tar", [("about.md", bytes(before)), *members])
    start, stop = header_of(path, "000003.jpg"), header_of(path, end)
    spoil(path, start, bytes(stop - start))
    assert stop % 10240 == 0
    shards = open_set(path)
    assert numbers(shards) == kept
    assert shards.known_bad.counts == {"truncated_tar": 9 - len(kept)}


@pytest.mark.parametrize("known_by", ["statistics", "neighbours"])
def test_of_a_tar_that_is_cut_short_the_lost_samples_are_counted(tmp_path: Path, known_by: str) -> None:
    path = whole(tmp_path / "00000.tar", 8)
    path.write_bytes(path.read_bytes()[: header_of(path, "000002.jpg") + 700])
    others = [whole(tmp_path / f"0000{number}.tar", 8) for number in (1, 2)] if known_by == "neighbours" else []
    if known_by == "statistics":
        (tmp_path / "00000_stats.json").write_text('{"count": 11, "successes": 8}')
    shards = open_set(path, *others)
    assert len(shards) == 2 + 8 * len(others)
    assert shards.known_bad.counts == {"truncated_tar": 6}
    assert shards.known_bad.seen == 8 + 8 * len(others)
    with pytest.raises(ValueError, match=r"truncated_tar 6"):
        open_shards([str(path), *map(str, others)], max_bad_fraction=0.05)


def test_a_member_that_is_cut_short_is_not_counted_again_beside_its_sample(tmp_path: Path) -> None:
    """All .json come first, then all images: those that are missing show in the samples that are there."""
    members = [member for number in range(8) for member in pair(f"{number:06d}", number)]
    kinds = ["json", "jpg", "txt"]
    path = write_tar(tmp_path / "00000.tar", sorted(members, key=lambda member: kinds.index(member[0].rpartition(".")[2])))
    path.write_bytes(path.read_bytes()[: header_of(path, "000001.jpg") + 700])
    shards = open_set(path, whole(tmp_path / "00001.tar", 8), whole(tmp_path / "00002.tar", 8))
    assert shards.known_bad.counts == {"missing_image": 7, "missing_caption": 1}


def test_links_inside_the_tar_are_followed_and_others_counted(tmp_path: Path) -> None:
    path = whole(tmp_path / "0.tar", 2)
    add(path, "hard.jpg", kind=tarfile.LNKTYPE, target="000001.jpg")
    add(path, "hard.txt", kind=tarfile.LNKTYPE, target="000001.txt")
    add(path, "more/soft.jpg", kind=tarfile.SYMTYPE, target="../000000.jpg")
    add(path, "more/soft.txt", kind=tarfile.SYMTYPE, target="../000000.txt")
    add(path, "lost.jpg", kind=tarfile.SYMTYPE, target="/etc/hostname")
    add(path, "lost.txt", kind=tarfile.LNKTYPE, target="nothing.txt")
    shards = open_set(path)
    assert numbers(shards) == [0, 1, 1, 0]
    assert shards.known_bad.counts == {"unused_members": 1}
    assert "lost.jpg, links that lead nowhere" in shards.known_bad.examples["unused_members"]


def test_samples_whose_keys_hold_dots_are_counted_once_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = whole(tmp_path / "0.tar", 2)
    for name, content in (("photo.1.jpg", jpeg(1)), ("photo.1.txt", b"one"), ("photo.2.jpg", jpeg(2)), ("photo.2.txt", b"two")):
        add(path, name, content)
    add(path, "000000.mask.jpg", jpeg(3))
    shards = open_set(path)
    assert numbers(shards) == [0, 1]
    assert shards.known_bad.counts == {"unused_members": 2}
    assert shards.known_bad.seen == 4
    assert "members with keys with dots" in caplog.text  # the mask, which belongs to a sample that is used


def test_a_sparse_member_is_read_with_its_holes(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("needs GNU tar, which writes sparse members")
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    with (tmp_path / "a.txt").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"behind the hole")
    for form in ("gnu", "posix"):
        os.system(f"cd {tmp_path} && tar --format={form} --sparse -cf {form}.tar a.jpg a.txt")
        assert (tmp_path / f"{form}.tar").stat().st_size < 1 << 17
        text = open_set(tmp_path / f"{form}.tar").read(0, ("caption",)).members["caption"]
        assert text == bytes(1 << 20) + b"behind the hole"


def test_what_is_lost_is_said_at_every_start_by_one_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = whole(tmp_path / "0.tar")
    spoil(path, header_of(path, "000002.txt"), b"\xff")
    for _ in range(2):
        caplog.clear()
        open_set(path)
        assert "1 of 6 samples cannot be used, truncated_tar: " in caplog.text
    caplog.clear()
    open_set(path, rank=1)
    assert caplog.text == ""


def test_an_index_with_one_flipped_bit_is_built_anew_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = whole(tmp_path / "0.tar")
    open_set(path)
    (stored,) = tmp_path.glob("*.npy")
    content = bytearray(stored.read_bytes())
    for place in range(5, len(content), 131):
        spoiled = bytearray(content)
        spoiled[place] ^= 4
        stored.write_bytes(spoiled)
        caplog.clear()
        assert numbers(open_set(path)) == list(range(6))
        assert "is damaged and is built anew" in caplog.text or np.load(stored)[0]["key"] == tar_index._MAGIC
        assert stored.read_bytes() == content


def test_offsets_that_do_not_belong_to_the_member_are_noticed_at_reading(tmp_path: Path) -> None:
    """A shard that was exchanged for another of the same size and date, which its index cannot know."""
    path, other = whole(tmp_path / "0.tar", 2), write_tar(tmp_path / "1.tar", [*pair("000001", 1), *pair("000000", 0)])
    shards = open_set(path)
    assert other.stat().st_size == path.stat().st_size
    other.replace(path)
    with pytest.raises(BadSample, match=r"another member lies at byte 0: the shard has changed since it was indexed"):
        shards.read(0, ("image", "caption"))


def test_the_signature_follows_the_content_and_not_the_dates(tmp_path: Path) -> None:
    one = open_set(whole(tmp_path / "a" / "0.tar"))
    copy = tmp_path / "b" / "0.tar"
    copy.parent.mkdir()
    shutil.copy(tmp_path / "a" / "0.tar", copy)
    os.utime(copy, ns=(1, 1))
    changed = open_set(write_tar(tmp_path / "c" / "0.tar", [member for number in range(6) for member in pair(f"{number:06d}", number ^ 1)]))
    assert open_set(copy).signature == one.signature
    assert changed.signature != one.signature
    assert changed.signature_of_names == one.signature_of_names


@pytest.mark.parametrize("stamp", [-5_000_000_000, 2**62])
def test_a_shard_of_any_date_is_indexed(tmp_path: Path, stamp: int) -> None:
    path = whole(tmp_path / "0.tar", 2)
    os.utime(path, ns=(stamp, stamp))
    assert numbers(open_set(path)) == numbers(open_set(path)) == [0, 1]


def test_a_name_of_more_than_a_hundred_letters_is_not_taken_from_its_short_form(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [member for number in range(4) for member in pair(f"{'long/' * 25}ä{number}", number)])
    name = f"{'long/' * 25}ä2.jpg"
    spoil(path, header_of(path, name) + 8, b"\xff")  # the record that holds its name
    shards = open_set(path)
    assert numbers(shards) == [0, 1, 3]
    assert shards.known_bad.counts == {"truncated_tar": 1}


def test_statistics_that_are_damaged_are_as_if_they_were_not_there_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = whole(tmp_path / "00000.tar", 3)
    for text in ("", "[1]", '{"successes": "many"}', '{"successes": -1}', "[" * 100_000, json.dumps({"successes": True})):
        (tmp_path / "00000_stats.json").write_text(text)
        (tmp_path / "00000.tar.txt.index.npy").unlink(missing_ok=True)
        caplog.clear()
        assert open_set(path).known_bad.total == 0
        assert "00000_stats.json holds no count of samples" in caplog.text


def test_a_caption_that_is_missing_is_said_of_a_training_set_and_of_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = whole(tmp_path / "0.tar")
    add(path, "alone.jpg", jpeg(1))
    open_set(path)
    assert caplog.text == ""
    open_shards([str(path)], max_bad_fraction=0.5)
    assert "1 of 7 samples cannot be used, missing_caption: " in caplog.text
    assert "0.tar: alone" in caplog.text
