"""What several test folders share: a small shapes world and a recipe that trains on it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# The tests compare runs on the CPU bit for bit, on machines with a GPU too; tests of a GPU start processes of their own.
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none, and say so."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def no_process_is_left() -> Iterator[None]:
    """Of those that multiprocessing starts, after the test."""
    yield
    assert multiprocessing.active_children() == []


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 training pairs in 3 shards, 60 test pairs, 70 zero-shot images, a tokenizer."""
    from megakd.data.shapes import write_world

    return write_world(tmp_path_factory.mktemp("world") / "shapes", train=600, test=60, shard_size=200, zeroshot_per_class=2).out


@pytest.fixture(scope="session")
def recipe_file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe of `support.runs`, on the world's shards."""
    from support.runs import RECIPE

    path = tmp_path_factory.mktemp("recipes") / "tiny.toml"
    path.write_text(RECIPE.format(world=world), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def evaluations(world: Path) -> tuple[str, ...]:
    """Overrides that name one evaluation set of each kind."""
    return (
        f"evaluation.zero_shot={{ seen = '{world}/zeroshot' }}",
        f"evaluation.retrieval={{ test = '{world}/test/*.tar' }}",
        f"evaluation.hard_negatives={{ test = '{world}/test/*.tar' }}",
        "evaluation.batch=7",
    )
