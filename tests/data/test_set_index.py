"""The file that says what the indexes of a set's shards tell: the same answers, no index opened for them, and none that is stale."""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from megakd.data import tar_index
from megakd.data.patterns import expand
from megakd.data.set_index import SMALLEST
from megakd.data.shards import ShardSet
from megakd.data.storage import SET_INDEX
from support.shards import data, no_barrier, pair, write_tar

COUNT = SMALLEST + 1


def many(folder: Path, count: int = COUNT) -> str:
    """Shards of one or two samples; one sample has no caption and another no image, and a shard says that it has lost one."""
    for number in range(count):
        members = [*pair(f"{number:06d}", number), *(pair(f"{number:06d}b", number) if number % 2 else [])]
        if number in (3, 4):
            members.append((f"x{number}.{'jpg' if number == 3 else 'txt'}", b"alone"))
        write_tar(folder / f"{number:05d}.tar", members)
    (folder / "00006_stats.json").write_text('{"successes": 2}')
    return f"{folder}/{{00000..{count - 1:05d}}}.tar"


def opened(pattern: str, rank: int = 0, world: int = 1, **settings: object) -> ShardSet:
    return ShardSet.open(data(pattern, max_bad_fraction=0.2, **settings), rank, world, no_barrier)


def facts(shards: ShardSet) -> dict[str, object]:
    """All that a set holds but its reader and which indexes it has compared; and every sample's bytes, for which it opens the indexes."""
    left_out = ("_reader", "_rows", "_unchecked", "starts")
    told = {field.name: getattr(shards, field.name) for field in fields(shards) if field.name not in left_out}
    read = list(shards.read_each(list(range(len(shards))), ("image", "caption")))
    return told | {"starts": shards.starts.tolist(), "signature": shards.signature, "read": [str(sample) for sample in read]}


def stored(folder: Path) -> Path:
    (found,) = folder.glob(f"*{SET_INDEX}")
    return found


def opens_no_index(patched: pytest.MonkeyPatch) -> None:
    for name in ("load", "load_checked", "build"):
        patched.setattr(tar_index, name, lambda *_, **__: pytest.fail("an index was opened"))


def test_a_second_start_tells_the_same_and_opens_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = many(tmp_path)
    first = opened(pattern)
    assert {"missing_caption", "missing_image", "truncated_tar"} <= set(first.known_bad.counts)
    with monkeypatch.context() as patched:
        opens_no_index(patched)
        second = opened(pattern)
    assert second._unchecked.all()
    assert facts(second) == facts(first)
    assert not second._unchecked.any()


def test_few_shards_have_no_such_file(tmp_path: Path) -> None:
    opened(many(tmp_path, 8))
    assert not list(tmp_path.glob(f"*{SET_INDEX}"))


@pytest.mark.parametrize("change", ["content", "date"])
def test_of_a_shard_that_changed_the_own_index_is_read_and_of_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    pattern = many(tmp_path)
    before = opened(pattern)
    if change == "content":
        write_tar(tmp_path / "00007.tar", [member for key in "abc" for member in pair(key, 50)])
    else:
        os.utime(tmp_path / "00007.tar", ns=(5, 5))
    loaded: list[str] = []
    load = tar_index.load_checked
    monkeypatch.setattr(tar_index, "load_checked", lambda name, *more: (loaded.append(Path(name).stem), load(name, *more))[1])
    after = opened(pattern)
    assert set(loaded) == {"00007"}
    assert len(after) == len(before) + (change == "content")
    assert (after.signature == before.signature) == (change == "date")
    loaded.clear()
    assert facts(opened(pattern)) == facts(after)  # the file was written anew
    assert after.names == expand(pattern)


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other_json", "deep", "too_few", "binary", "no_counts"])
def test_a_damaged_file_is_said_and_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    pattern = many(tmp_path)
    whole, path = facts(opened(pattern)), stored(tmp_path)
    content = path.read_bytes()
    bit = bytearray(content)
    bit[len(bit) // 2] ^= 1
    body = content.partition(b"\n")[2]
    put = {
        **{"cut": content[:-9], "bit": bytes(bit), "empty": b"", "binary": os.urandom(400), "deep": b"[" * 100_000},
        "other_json": b'{"a": 1}\n' + body,
        "too_few": b"%d\n[]" % zlib.crc32(b"[]"),
    }
    uncounted = json.dumps([[*entry[:2], "2", *entry[3:]] for entry in json.loads(body)]).encode()
    put["no_counts"] = b"%d\n%s" % (zlib.crc32(uncounted), uncounted)
    path.write_bytes(put[damage])
    assert facts(opened(pattern)) == whole
    assert "is damaged and is written anew" in caplog.text
    assert path.read_bytes() == content


def test_an_index_that_is_gone_or_damaged_is_built_again_where_the_file_tells_of_its_shard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pattern = many(tmp_path)
    whole = facts(opened(pattern))
    gone, damaged = (tmp_path / f"{number:05d}.tar.txt.index.npy" for number in (5, 9))
    content = damaged.read_bytes()
    gone.unlink()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    shards = opened(pattern)
    assert gone.is_file()
    assert facts(shards) == whole
    assert damaged.read_bytes() == content
    assert "00009.tar is damaged and is built anew" in caplog.text.replace("the index of ", "").replace(f"{tmp_path}/", "")


def test_every_rank_looks_after_its_share_and_all_tell_the_same(tmp_path: Path) -> None:
    pattern = many(tmp_path)
    whole = facts(opened(pattern))
    missing = [tmp_path / f"{number:05d}.tar.txt.index.npy" for number in range(COUNT)]
    for path in missing:
        path.unlink()

    def others() -> None:
        assert [path.is_file() for path in missing] == [number % 3 == 1 for number in range(COUNT)]

    shards = ShardSet.open(data(pattern, max_bad_fraction=0.2), 1, 3, others)
    assert facts(shards) == whole


def test_starts_at_the_same_time_tell_the_same(tmp_path: Path) -> None:
    """Four at once, of which the first writes the file anew whenever it starts, as its last shard has another date then."""
    pattern = many(tmp_path)
    lengths, failures = set[tuple[int, int]](), list[BaseException]()
    opened(pattern)

    def start(rank: int) -> None:
        try:
            for turn in range(4):
                if rank == 0:
                    os.utime(tmp_path / f"{COUNT - 1:05d}.tar", ns=(turn, turn))
                found = opened(pattern, rank, 4)
                lengths.add((len(found), found.signature))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(lengths) == 1


def test_other_members_and_another_order_have_a_file_of_their_own(tmp_path: Path) -> None:
    pattern = many(tmp_path)
    one, names = opened(pattern), expand(pattern)
    other = opened(pattern, captions={"txt": 1, "json:number": 1})
    turned = ShardSet.open(data(names[::-1], max_bad_fraction=0.2), 0, 1, no_barrier)
    assert len(list(tmp_path.glob(f"*{SET_INDEX}"))) == 3
    assert len({shards.signature for shards in (one, other, turned)}) == 3
    assert np.array_equal(turned.starts[1:] - turned.starts[:-1], (one.starts[1:] - one.starts[:-1])[::-1])


def test_the_file_goes_to_the_cache_and_no_pattern_takes_it_for_a_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pattern = many(tmp_path / "tars")
    opened(pattern, cache=str(tmp_path / "cache"))
    assert stored(tmp_path / "cache/indexes").is_file()
    assert not list((tmp_path / "tars").glob(f"*{SET_INDEX}"))
    opened(pattern)
    (tmp_path / "tars/00006_stats.json").unlink()
    assert len(expand(f"{tmp_path}/tars/*")) == COUNT
    assert "are no .tar" not in caplog.text


def test_a_shard_of_another_length_than_at_the_start_ends_the_reading(tmp_path: Path) -> None:
    pattern = many(tmp_path)
    opened(pattern)
    shards = opened(pattern)
    other = open_one(tmp_path / "other/00008.tar")
    (tmp_path / "00008.tar.txt.index.npy").write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"00008\.tar has 3 samples now, other than when the run began.*start it again"):
        shards.keys(8)
    assert len(opened(pattern).keys(8)) == 3  # which helps


def test_a_shard_written_anew_at_its_size_and_date_is_read_once_its_index_is_gone(tmp_path: Path) -> None:
    pattern = many(tmp_path)
    before = opened(pattern)
    path = tmp_path / "00008.tar"
    size, date = path.stat().st_size, path.stat().st_mtime_ns
    write_tar(path, [member for key in "ab" for member in pair(key, 60)])
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))
    os.utime(path, ns=(date, date))
    (tmp_path / "00008.tar.txt.index.npy").unlink()
    with pytest.raises(ValueError, match=r"00008\.tar has 2 samples, and the index of its set says 1 of another content.*start again"):
        opened(pattern)
    after = opened(pattern)
    assert len(after) == len(before) + 1
    assert len(after.keys(8)) == 2


def test_samples_that_a_removed_stats_json_told_of_are_lost_no_more(tmp_path: Path) -> None:
    pattern = many(tmp_path)
    assert opened(pattern).known_bad.counts["truncated_tar"] == 1
    (tmp_path / "00006_stats.json").unlink()
    for _ in range(2):
        assert "truncated_tar" not in opened(pattern).known_bad.counts


@pytest.mark.parametrize("found", ["damaged", "outdated", "damaged before a sound one"])
def test_a_rank_with_a_disk_of_its_own_replaces_what_it_has_found(tmp_path: Path, caplog: pytest.LogCaptureFixture, found: str) -> None:
    """A rank other than the first, which replaces files in any case."""
    pattern, more = many(tmp_path / "tars"), {"cache": str(tmp_path / "cache")}
    opened(pattern, **more)
    path = stored(tmp_path / "cache/indexes")
    if found == "damaged before a sound one":
        shutil.copy(path, tmp_path / "tars")
    if found == "outdated":
        os.utime(tmp_path / "tars/00007.tar", ns=(5, 5))
    else:
        path.write_bytes(b"1\n[]")
    changed = path.read_bytes()
    opened(pattern, 1, 2, **more)
    assert path.read_bytes() != changed
    caplog.clear()
    kept = path.stat().st_mtime_ns
    opened(pattern, 1, 2, **more)
    assert "damaged" not in caplog.text
    assert path.stat().st_mtime_ns == kept


def open_one(path: Path) -> Path:
    """The index of a shard with three samples that says the size and date of 00008.tar of `many`."""
    real = path.parents[1] / path.name
    write_tar(path, [member for key in "abc" for member in pair(key, 1)])
    found = tar_index.build(str(path), tar_index.Stat(path.stat().st_size, path.stat().st_mtime_ns), ("txt",), None)
    rows = np.array(found)
    rows[0]["image_offset"], rows[0]["caption_offset"] = real.stat().st_size, real.stat().st_mtime_ns
    rows[0]["image_check"] = tar_index._checksum(rows)
    place = path.with_name("faked.npy")
    np.save(place, rows, allow_pickle=False)
    return place
