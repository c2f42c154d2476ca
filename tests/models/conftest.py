"""What the tests of models share: the shapes world's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer(world: Path) -> Path:
    return world / "tokenizer"
