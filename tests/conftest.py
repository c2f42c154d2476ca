"""What several test folders share: a small shapes world and a recipe that trains on it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The tests compare runs on the CPU bit for bit, on machines with a GPU too; tests of a GPU start processes of their own.
os.environ.setdefault("DS_ACCELERATOR", "cpu")


# Whose files take longest, the longest first: so no process is left alone with one of them in the end.
SLOWEST = ("slurm", "training", "evaluation", "teachers", "runtime", "models", "planning", "benchmarks", "vqa", "faults")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, in the order of collection, with all of tests/slurm in one process: its tests share a cluster, and mostly wait."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if "/slurm/" in nodeid else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none, and say so."""
    import torch

    items.sort(key=lambda item: [*SLOWEST, item.path.parent.name].index(item.path.parent.name))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def no_process_is_left() -> Iterator[None]:
    """Of those that multiprocessing starts, after the test."""
    yield
    assert multiprocessing.active_children() == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from support.browser import started

    with started() as running:
        yield running


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
