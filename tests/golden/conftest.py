"""A workplace that the golden tests of a module share: each has its own run folders in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.golden import make_workplace


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("golden"))
