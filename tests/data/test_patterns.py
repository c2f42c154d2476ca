"""The names of shards from a recipe's patterns: whatever a pattern says is done, or refused with the remedy."""

import logging
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from megakd.data.patterns import expand
from support.shards import data, open_shards, pair, write_tar


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{01..03}.tar", "01 02 03"),
        ("{3..1}.tar", "3 2 1"),
        ("{0..10..5}.tar", "0 5 10"),
        ("{00..10..5}.tar", "00 05 10"),
        ("{a..c}.tar", "a b c"),
        ("{a,{b,c}}.tar", "a b c"),
        ("{a,x{0..2}}.tar", "a x0 x1 x2"),
        ("{{0..1},7}.tar", "0 1 7"),
        ("{a}{b,c}.tar", "{a}b {a}c"),
        ("{,x}1.tar", "1 x1"),
        ("[ab].tar", "a b"),
        ("[!a].tar", "b"),
        ("?1.tar", "a1"),
    ],
)
def test_braces_are_expanded_as_in_bash_and_globs_match(folder: Path, pattern: str, names: str) -> None:
    touch(*(f"{name}.tar" for name in names.split()))
    if pattern == "[!a].tar":
        touch("a.tar")
    assert expand(pattern) == [f"{name}.tar" for name in names.split()]


def test_two_stars_reach_folders_at_any_depth_and_a_tilde_is_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("s/0.tar", "s/a/1.tar", "s/a/b/2.tar")
    assert expand("s/**/*.tar") == ["s/0.tar", "s/a/1.tar", "s/a/b/2.tar"]
    monkeypatch.setenv("HOME", str(folder))
    assert expand("~/s/*.tar") == [str(folder / "s/0.tar")]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("s/a**/*.tar", r"'\*\*' stands for folders at any depth and has to be a whole part"),
        ("$DATA/0.tar", "variables such as"),
        ("${DATA}/0.tar", "variables such as"),
        ("simplecache::memory://x.tar", "fsspec's chained URLs are not read"),
        ("{00..05.tar", "its braces are no list and no range"),
        ("{0..9..0}.tar", "step of 0"),
        ("{0..1e9}.tar", "its braces are no list and no range"),
        ("{0..9}" * 8 + ".tar", "more than 1000000 shards"),
        ("{a," * 3000 + "b" + "}" * 3000, "nested too deeply"),
        ("{a,b}" * 3000 + ".tar", "too many"),
        ("{a,b}" * 30 + ".tar", "more than 1000000 shards"),
        ("s/0.tar::./s/0.tar", r"s/0\.tar is named twice, by 's/0\.tar' and by '\./s/0\.tar'"),
        ("s/{0,0}.tar", "is named twice"),
        ("s/*.tgz", "compressed tars"),
        ("pipe.tar", "is no file but a folder, a pipe or a device"),
        ("s/*/", "is no file but|is a folder"),
        ("x" * 5000, "cannot be looked at"),
    ],
)
def test_what_would_not_be_followed_is_refused(folder: Path, pattern: str, said: str) -> None:
    touch("s/0.tar", "s/a/1.tar", "s/2.tgz")
    os.mkfifo("pipe.tar")
    with pytest.raises(ValueError, match=said):
        expand(pattern)


def test_a_star_takes_the_tars_and_names_what_it_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2):
        write_tar(folder / f"s/{number}.tar", pair("a", number))
    touch("s/0_stats.json", "s/0.parquet")
    for _ in range(2):  # the second start finds indexes there, which are nobody's business
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(open_shards("s/*")) == 2
        assert "2 files are no .tar and are left out: s/0.parquet, s/0_stats.json" in caplog.text
        assert len(list(Path("s").glob("*.npy"))) == 2


def test_files_that_are_not_called_tar_are_taken_where_no_other_is_there(folder: Path) -> None:
    write_tar(folder / "s/part-0", pair("a", 0))
    assert expand("s/*") == ["s/part-0"]


def test_a_folder_without_permission_and_odd_names_are_told_in_one_line(folder: Path) -> None:
    name = os.fsdecode(b"new\nline\xff.tar")
    write_tar(folder / name, pair("a", 0))
    assert len(open_shards([name])) == 1
    with pytest.raises(ValueError, match=r"no shard gone\\n\.tar"):
        expand("gone\n.tar")


@pytest.mark.parametrize("caption", ["json", ".json", "jpg", "cls", "", ".", "*", "txt,json", "a/b"])
def test_a_caption_that_is_no_text_is_refused(caption: str) -> None:
    with pytest.raises(ValidationError, match="caption = "):
        data("a.tar", caption=caption)


def test_each_shard_is_looked_at_once_as_a_metadata_server_answers_for_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(b"")
    looked, stat = list[str](), os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: (looked.append(os.path.basename(path)), stat(path, **more))[1])
    assert len(expand(f"{tmp_path}/{{0..2}}.tar")) == 3
    assert sorted(name for name in looked if name.endswith(".tar")) == ["0.tar", "1.tar", "2.tar"]


def test_a_folder_that_is_called_as_a_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.tar").mkdir()
    with pytest.raises(ValueError, match=r"0\.tar is no file but a folder"):
        expand(str(tmp_path / "0.tar"))
