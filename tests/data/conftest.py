"""What the tests of data share: a clean set of shards, and a user's cache of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.data.shards import ShardSet
from support.shards import open_shards, write_set


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """43 samples in 3 shards."""
    return open_shards(write_set(tmp_path_factory.mktemp("clean"), 43, 3))
