"""Files and folders are whole or absent, and what a killed writer leaves is found again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megakd.benchmarks.common import environment
from megakd.data import tar_index
from megakd.models import weights
from megakd.runtime import files


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("alone", [False, True])
def test_a_file_is_replaced_when_its_successor_is_whole(tmp_path: Path, alone: bool) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")

    def interrupted() -> None:
        with files.atomic_file(target, alone=alone) as partial:
            partial.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert target.read_text() == "old"
    with files.atomic_file(target, alone=alone) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    files.clear(tmp_path)
    assert _names(tmp_path) == ["a.json"]


def test_a_folder_is_replaced_when_its_successor_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("first", "second"):
        with files.atomic_folder(target) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "a").write_text(content)
        assert (target / "inner" / "a").read_text() == content

    def interrupted() -> None:
        with files.atomic_folder(target) as partial:
            (partial / "a").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert (target / "inner" / "a").read_text() == "second"
    assert _names(tmp_path) == ["model"]


def test_what_killed_writers_left_is_cleared_and_what_was_being_replaced_comes_back(tmp_path: Path) -> None:
    for name in (".b.json.xyz.partial", ".run.json.partial", "metrics.partial"):
        (tmp_path / name).write_text("half")
    for name in (".partial_step_00000003", ".removed_step_00000001", ".step_00000004.partial", ".step_00000002.removed", ".model.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / "bundle").mkdir()
    (tmp_path / ".bundle.replaced").mkdir()
    (tmp_path / ".gitignore").write_text("a user's")
    found = files.clear(tmp_path, tmp_path / "not there")
    assert len(found) == 9
    assert _names(tmp_path) == [".gitignore", "bundle", "model"]
    assert (tmp_path / "model" / "weights").read_text() == ".model.replaced"
    assert files.clear(tmp_path) == []


def test_a_folder_that_is_removed_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "step_00000001"
    target.mkdir()
    (target / "a").write_text("x")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        files.remove(target)
    monkeypatch.undo()
    files.clear(tmp_path)
    assert _names(tmp_path) in ([], ["step_00000001"])


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"XDG_CACHE_HOME": "/caches", "HOME": "/home/a"}, "/caches"),
        ({"HOME": "/home/a"}, "/home/a/.cache"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/a"}, "/home/a/.cache"),
        ({"XDG_CACHE_HOME": "caches", "HOME": "/home/a"}, "/home/a/.cache"),
    ],
)
def test_the_users_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: str) -> None:
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert files.users_cache() == Path(found)


def test_a_user_without_a_home_has_no_cache_and_no_folder_of_that_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`~` stays what it is, as in a container that is run under a number that no one has."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "~")
    assert os.path.expanduser("~/.cache") == "~/.cache"
    assert files.users_cache() is None
    assert tar_index.places("a.index.npy", "/shards/a.index.npy", None) == ["/shards/a.index.npy"]
    source = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2)}, source)
    assert weights.convert(source).parent == tmp_path
    with pytest.raises(ValueError, match=r"no home directory: export XDG_CACHE_HOME"):
        environment.cache()
