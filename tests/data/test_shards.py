import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megakd.data import storage, tar_index
from megakd.data.bad_samples import REASONS, BadCounter, BadLog, BadSample
from megakd.data.shards import ShardSet, expand
from support.shards import data, jpeg, no_barrier, open_shards, pair, write_set, write_tar


def open_set(pattern: str | list[str], **more: object) -> ShardSet:
    return ShardSet.open_set(pattern, data(pattern, **more), 0, 1, no_barrier)


def copied(shards: ShardSet) -> ShardSet:
    """As a worker that is spawned receives it."""
    copy: ShardSet = pickle.loads(pickle.dumps(shards))  # noqa: S301  # our own bytes
    return copy


def captions(shards: ShardSet) -> list[str]:
    return [shards.read(index, ("caption",)).members["caption"].decode() for index in range(len(shards))]


def test_patterns_expand_to_existing_shards_in_order(tmp_path: Path) -> None:
    for name in ("00008", "00009", "00010", "a", "b"):
        write_tar(tmp_path / f"{name}.tar", pair("k", 1))
    assert [Path(name).stem for name in expand(f"{tmp_path}/{{00008..00010}}.tar")] == ["00008", "00009", "00010"]
    assert [Path(name).stem for name in expand(f"{tmp_path}/{{b,a}}.tar::{tmp_path}/00009.tar")] == ["b", "a", "00009"]
    assert [Path(name).stem for name in expand([f"{tmp_path}/0*.tar", f"file://{tmp_path}/a.tar"])] == ["00008", "00009", "00010", "a"]


def test_nested_ranges_multiply(tmp_path: Path) -> None:
    for name in ("a08", "a09", "b08", "b09"):
        write_tar(tmp_path / f"{name}.tar", pair("k", 1))
    assert [Path(name).stem for name in expand(f"{tmp_path}/{{a,b}}{{08..09}}.tar")] == ["a08", "a09", "b08", "b09"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("{root}/{{00000..00002}}.tar", r"no shard .*00001\.tar \(of .*\{00000\.\.00002\}"),
        ("{root}/nothing*.tar", r"no shard .*nothing\*\.tar"),
        ("data/shapes/train/00000.tar", r"megakd shapes data/shapes --train 20000 --test 2000"),
        ("{root}/else/data/shapes/test/00000.tar", r"megakd shapes /.*/else/data/shapes --train 20000"),
        ("{root}/data/shapes/test/00009.tar", r"00009\.tar: check the path and the braces' range"),
        ("memory://bucket/none.tar", r"no shard memory://bucket/none\.tar: check the URL"),
        ("memory://bucket/*.tar", r"globs work for local paths alone"),
        ("{root}", r"is a folder: name its shards"),
        ("nowhere://x.tar", r"nowhere://x\.tar: .*not known"),
        ("::", r"names no shard"),
        ("{{0..99999999999}}.tar", r"more than 1000000 shards"),
    ],
)
def test_a_missing_shard_is_named_with_pattern_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)  # the repository's own folder may hold data/shapes
    write_tar(tmp_path / "00000.tar", pair("k", 1))
    (tmp_path / "data" / "shapes").mkdir(parents=True)
    if "{root}/data" in pattern:
        (tmp_path / "data" / "shapes" / "world.json").touch()  # `megakd shapes` would find a finished world there, and write nothing
    with pytest.raises(ValueError, match=said):
        expand(pattern.format(root=tmp_path))


def test_samples_are_read_back_by_index(tmp_path: Path) -> None:
    shards = open_set(write_set(tmp_path, 10, 3))
    assert len(shards) == 10
    assert captions(shards) == [f"caption {number}" for number in range(10)]
    assert shards.read(7, ("image", "json")).members == {"image": jpeg(7), "json": b'{"number": 7}'}
    assert shards.where(7) == f"{tmp_path}/00001.tar: 000007"
    assert captions(copied(shards)) == captions(shards)
    with pytest.raises(IndexError):
        shards.read(10, ("image",))


def test_the_index_is_made_once_beside_the_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_set(tmp_path, 4, 1)
    open_set(pattern)
    (stored,) = tmp_path.glob("*.npy")
    assert np.load(stored, allow_pickle=False).dtype.names is not None
    monkeypatch.setattr(tar_index, "_scan", lambda *_: pytest.fail("scanned again"))
    shards = open_set(pattern)
    assert captions(shards)[3] == "caption 3"
    assert all(isinstance(rows, np.memmap) for rows in shards._rows.values())


@pytest.mark.parametrize("damage", ["stale", "corrupt", "short", "pickle", "foreign", "other_array"])
def test_an_index_that_does_not_fit_is_rebuilt(tmp_path: Path, damage: str) -> None:
    pattern = write_set(tmp_path, 4, 1)
    open_set(pattern)
    (stored,) = tmp_path.glob("*.npy")
    if damage == "stale":
        write_tar(tmp_path / "00000.tar", [member for number in (8, 9) for member in pair(str(number), number)])
    elif damage == "corrupt":
        stored.write_bytes(os.urandom(300))
    elif damage == "short":
        stored.write_bytes(stored.read_bytes()[:-40])
    elif damage == "pickle":
        np.save(stored, np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    elif damage == "foreign":
        other = write_set(tmp_path / "other", 2, 1)
        open_set(other)
        stored.write_bytes(next((tmp_path / "other").glob("*.npy")).read_bytes())
    else:
        np.save(stored, np.zeros((3, 2)))
    assert captions(open_set(pattern)) == (["caption 8", "caption 9"] if damage == "stale" else [f"caption {i}" for i in range(4)])
    assert len(list(tmp_path.glob("*.npy"))) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_touched_tar_of_the_same_size_is_indexed_anew(tmp_path: Path) -> None:
    pattern = write_set(tmp_path, 2, 1)
    stale = open_set(pattern)
    write_tar(tmp_path / "00000.tar", [member for number in (1, 0) for member in pair(f"{number:06d}", number)])
    os.utime(tmp_path / "00000.tar", ns=(1, stale.stats[0].stamp + 1))
    assert captions(open_set(pattern)) == ["caption 1", "caption 0"]


def test_the_index_goes_to_the_cache_and_then_to_the_users_folder(tmp_path: Path) -> None:
    pattern = write_set(tmp_path / "tars", 4, 1)
    open_set(pattern, cache=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache/indexes").glob("*.npy"))) == 1
    assert not list((tmp_path / "tars").glob("*.npy"))
    # neither the cache (it is a file) nor the place beside the tar (a folder lies there) can be written; root could write anywhere
    (tmp_path / "file").write_text("")
    blocked = write_set(tmp_path / "blocked", 4, 1)
    (tmp_path / "blocked/00000.tar.txt.index.npy").mkdir()
    shards = open_set(blocked, cache=str(tmp_path / "file"))
    assert captions(shards)[0] == "caption 0"
    assert len(list((tmp_path / "xdg/megakd/indexes").glob("*.npy"))) == 1


def test_without_any_place_for_the_index_it_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    pattern = write_set(tmp_path, 4, 1)
    (tmp_path / "00000.tar.txt.index.npy").mkdir()
    (tmp_path / "xdg").write_text("")
    assert captions(open_set(pattern))[2] == "caption 2"
    assert "set data.cache" in caplog.text


@pytest.mark.parametrize("cut", ["in_image", "in_caption", "in_header", "before_end_marker"])
def test_a_truncated_tar_keeps_the_samples_before_the_cut(tmp_path: Path, cut: str) -> None:
    path = write_tar(tmp_path / "0.tar", [member for number in range(5) for member in pair(f"{number}", number)])
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar.getmembers()}
    length = {
        "in_image": members["3.jpg"].offset_data + 100,
        "in_caption": members["3.txt"].offset_data + 3,
        "in_header": members["3.txt"].offset + 200,
        "before_end_marker": members["2.json"].offset_data + 512,
    }[cut]
    path.write_bytes(path.read_bytes()[:length])
    shards = open_set(str(path))
    assert captions(shards) == ["caption 0", "caption 1", "caption 2"]
    assert shards.known_bad.counts == {"truncated_tar": 1}
    assert shards.known_bad.seen == 4
    assert captions(open_set(str(path))) == captions(shards)  # and from the stored index


def test_an_empty_file_is_a_truncated_tar(tmp_path: Path) -> None:
    (tmp_path / "1.tar").write_bytes(b"")
    shards = open_set([str(write_tar(tmp_path / "0.tar", pair("a", 0))), str(tmp_path / "1.tar")])
    assert len(shards) == 1
    assert shards.known_bad.counts == {"truncated_tar": 1}


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused_with_the_remedy(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, f"w:{mode}") as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(ValueError, match=r"0\.tar is compressed: .*unpack it with `\w+ -d`"):
        open_set(str(path))


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ValueError, match=r"0\.tar is no tar file"):
        open_set(str(tmp_path / "0.tar"))


def test_a_negative_size_in_a_header_ends_the_scan_instead_of_looping(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [*pair("a", 0), *pair("b", 1)])
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmember("b.jpg").offset
    header = content[offset : offset + 512]
    header[124:136] = b"\xff" * 8 + (-512 & 0xFFFFFFFF).to_bytes(4, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    content[offset : offset + 512] = header
    path.write_bytes(content)
    shards = open_set(str(path))
    assert captions(shards) == ["caption 0"]
    assert shards.known_bad.counts["truncated_tar"] == 1


def test_names_in_a_tar_never_become_paths_and_links_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with tarfile.open(path, "w") as tar:
        for name, content in [*pair("../../evil", 0), *pair("/etc/passwd", 1), *pair("ok", 2)]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        links = {"link.txt": tarfile.SYMTYPE, "hard.txt": tarfile.LNKTYPE, "dev.jpg": tarfile.CHRTYPE, "f.jpg": tarfile.FIFOTYPE}
        for name, kind in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    before = sorted(tmp_path.parent.rglob("*"))
    shards = open_set(str(path), cache=str(tmp_path / "cache"))
    assert captions(shards) == ["caption 0", "caption 1", "caption 2"]
    assert [shards.where(index).split(": ")[1] for index in range(3)] == ["../../evil", "/etc/passwd", "ok"]
    added = [path for path in tmp_path.parent.rglob("*") if path not in before]
    assert all(path == tmp_path / "cache" or tmp_path / "cache" in path.parents for path in added)


def test_keys_are_the_folder_and_the_name_before_its_first_dot(tmp_path: Path) -> None:
    members = [("a/x.jpg", jpeg(0)), ("b/x.jpg", jpeg(1)), ("a/x.txt", b"of a"), ("b/x.txt", b"of b")]
    members += [("a/x.seg.jpg", b"other"), ("a/._x.jpg", b"mac")]
    shards = open_set(str(write_tar(tmp_path / "0.tar", members)))
    assert captions(shards) == ["of a", "of b"]
    assert shards.known_bad.total == 0
    assert shards.read(1, ("image",)).members["image"] == jpeg(1)


def test_a_key_that_comes_again_is_another_sample_with_its_own_caption(tmp_path: Path) -> None:
    shards = open_set(str(write_tar(tmp_path / "0.tar", [*pair("a", 0), *pair("b", 1), *pair("a", 2)])))
    assert captions(shards) == ["caption 0", "caption 1", "caption 2"]
    assert shards.read(2, ("image",)).members["image"] == jpeg(2)


def test_the_first_image_of_a_sample_counts(tmp_path: Path) -> None:
    shards = open_set(str(write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(0)), ("a.png", b"x"), ("a.txt", b"c"), ("notes.md", b"-")])))
    assert len(shards) == 1
    assert shards.read(0, ("image",)).members["image"] == jpeg(0)


def test_long_and_strange_keys_are_labels(tmp_path: Path) -> None:
    shards = open_set(str(write_tar(tmp_path / "0.tar", [*pair("x" * 90 + "end", 0), *pair("bell\x07é", 1)])))
    assert shards.where(0).endswith("xxend")
    assert "\x07" not in shards.where(1)
    assert captions(shards) == ["caption 0", "caption 1"]


def test_another_caption_extension_has_its_own_index(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(0)), ("a.txt", b"short"), ("a.long", b"long one")]))
    assert captions(open_set(path)) == ["short"]
    assert captions(open_set(path, caption="long")) == ["long one"]


def test_every_rank_indexes_its_share_before_the_barrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_set(tmp_path, 8, 4)
    built: list[str] = []
    build = tar_index.build
    monkeypatch.setattr(tar_index, "build", lambda name, *more: (built.append(Path(name).stem), build(name, *more))[1])

    def others() -> None:
        assert built == ["00001", "00003"]

    assert len(ShardSet.open(data(pattern), 1, 2, others)) == 8
    assert built == ["00001", "00003", "00000", "00002"]  # what the other rank left out is made up for


def test_a_rank_that_fails_to_index_meets_the_others_at_the_barrier_first(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"\x1f\x8b" + b"0" * 600)
    met: list[int] = []
    with pytest.raises(ValueError, match="compressed"):
        ShardSet.open(data(str(tmp_path / "0.tar")), 0, 2, lambda: met.append(1))
    assert met == [1]


def test_what_the_index_knows_is_checked_at_open(tmp_path: Path) -> None:
    members = [member for number in range(8) for member in pair(str(number), number)]
    pattern = str(write_tar(tmp_path / "0.tar", [*members, ("x.jpg", jpeg(0)), ("y.txt", b"no image"), ("z.jpg", jpeg(0)), ("z.txt", b"")]))
    said = r"3 of 11 samples .*data\.max_bad_fraction = 0\.2: .*missing_image 1.*Example: .*0\.tar"
    with pytest.raises(ValueError, match=said):
        open_shards(pattern, max_bad_fraction=0.2)
    shards = open_shards(pattern, max_bad_fraction=0.3)
    assert shards.known_bad.counts == {"missing_image": 1, "missing_caption": 1, "empty_caption": 1}
    reasons = []
    for index in range(8, 11):
        with pytest.raises(BadSample) as caught:
            shards.read(index, ("image", "caption"))
        reasons.append(caught.value.reason)
    assert reasons == ["missing_caption", "missing_image", "empty_caption"]


def test_a_set_that_yields_nothing_is_an_error_at_open(tmp_path: Path) -> None:
    pattern = str(write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1))]))
    with pytest.raises(ValueError, match=r"none of the 2 samples .*\.txt members"):
        open_shards(pattern, max_bad_fraction=1.0)
    with pytest.raises(ValueError, match="not one sample"):
        open_shards(str(write_tar(tmp_path / "1.tar", [])))


def test_a_shard_that_shrinks_or_goes_during_the_run_is_noticed(tmp_path: Path) -> None:
    pattern = write_set(tmp_path, 4, 1)
    shards = open_set(pattern)
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:600])
    with pytest.raises(BadSample, match="has changed since it was indexed"):
        shards.read(3, ("image",))
    fresh = copied(shards)
    (tmp_path / "00000.tar").unlink()
    fresh._rows[0] = shards._rows[0]
    with pytest.raises(FileNotFoundError, match=r"00000\.tar is gone"):
        fresh.read(3, ("image",))


def test_few_files_stay_open(tmp_path: Path) -> None:
    count = storage.OPEN_FILES + 4
    shards = open_set(write_set(tmp_path, count, count))
    assert captions(shards) == captions(shards)
    assert len(shards._reader._files) == storage.OPEN_FILES


def test_the_signature_tells_other_data(tmp_path: Path) -> None:
    pattern = write_set(tmp_path / "a", 6, 2)
    assert open_set(pattern).signature == open_set(write_set(tmp_path / "b", 6, 2)).signature
    assert open_set(pattern).signature != open_set(write_set(tmp_path / "c", 7, 2)).signature


def test_counts_travel_as_integers_and_come_back() -> None:
    bad = BadCounter(seen=10)
    bad.add("corrupt_image", "0.tar: a", 2)
    bad.add("bad_text", "0.tar: b")
    values = bad.to_list()
    assert len(values) == 1 + len(REASONS)
    assert all(type(value) is int for value in values)
    assert BadCounter.from_list(values, bad) == bad
    summed = BadCounter.from_list([2 * value for value in values], bad)
    assert (summed.total, summed.seen, summed.fraction) == (6, 20, 0.3)
    bad.merge(summed)
    assert bad.counts == {"corrupt_image": 6, "bad_text": 3}
    assert bad.seen == 30


def test_too_many_bad_samples_raise_once_enough_were_seen() -> None:
    bad = BadCounter(seen=99)
    bad.add("corrupt_image", "0.tar: a (OSError)", 2)
    bad.check(0.01, at_least=100)
    bad.seen = 200
    bad.check(0.01, at_least=100)
    bad.add("bad_text", "0.tar: b")
    said = r"3 of 200 .*data\.max_bad_fraction = 0\.01: corrupt_image 2, bad_text 1\. Example: corrupt_image: 0\.tar: a \(OSError\)"
    with pytest.raises(ValueError, match=said):
        bad.check(0.01, at_least=100)


def test_the_log_of_bad_samples_is_rate_limited(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = BadLog(first=2, seconds=60.0, clock=lambda: now[0])
    for second in range(130):
        now[0] = float(second)
        bad = BadCounter(seen=4)
        bad.add("bad_text", f"0.tar: {second}", 2)
        log.report(bad)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert "and 119 more" in lines[2]
    log.close()
    log.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5
    assert sum(1 + int(line.partition(" and ")[2].partition(" ")[0]) for line in lines) == 260
    assert all("bad_text: 0.tar" in line for line in lines)


def test_indexing_tells_how_many_bytes_it_has_passed_up_to_the_last(tmp_path: Path) -> None:
    write_set(tmp_path, samples=30, shards=1)
    path = tmp_path / "00000.tar"
    stat, told = storage.stat(str(path)), list[int]()
    assert stat is not None
    tar_index.build(str(path), stat, "txt", None, done=told.append)
    assert len(told) >= 30  # along the way
    assert sum(told) == path.stat().st_size
