"""`log.profile`: what torch's profiler records of a run's steps, and what it writes."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from megakd.recipe.load import load
from megakd.runtime.profiler import BEFORE, TABLE, TRACE, recording
from megakd.runtime.run_folder import PROFILE
from support.runs import train

CPU = torch.device("cpu")


def steps(folder: Path, profiled: int, made: int) -> list[int]:
    """As a trainer's; each is one product, of matrices of as many rows as its number."""
    numbers = list(range(1, made + 1))
    with recording(profiled, folder, CPU) as after_step:
        for number in numbers:
            torch.ones(number, 4) @ torch.ones(4, 4)
            after_step()
    return numbers


def products(folder: Path) -> list[int]:
    """Rows of the recorded products."""
    events = json.loads(gzip.decompress((folder / TRACE).read_bytes()))["traceEvents"]
    return [event["args"]["Input Dims"][0][0] for event in events if event.get("name") == "aten::mm"]


def test_the_steps_behind_the_first_two_are_recorded_and_no_later_one(tmp_path: Path) -> None:
    assert steps(tmp_path / "profile", 3, 9) == list(range(1, 10))
    assert products(tmp_path / "profile") == [BEFORE + 1, BEFORE + 2, BEFORE + 3]
    assert "aten::mm" in (tmp_path / "profile" / TABLE).read_text(encoding="utf-8")


def test_a_run_that_ends_before_leaves_what_was_recorded(tmp_path: Path) -> None:
    steps(tmp_path, 5, 4)
    assert products(tmp_path) == [3, 4]


def test_without_the_key_nothing_is_written(tmp_path: Path) -> None:
    assert steps(tmp_path / "profile", 0, 4) == [1, 2, 3, 4]
    assert not (tmp_path / "profile").exists()


def test_more_steps_than_the_run_has_are_refused() -> None:
    with pytest.raises((ValueError, ValidationError), match=r"log\.profile = 9: .*optim\.steps = 10 .*set it to 8 at most"):
        load("smoke", ["optim.steps=10", "optim.warmup=2", "log.profile=9"])


def test_a_start_with_too_few_steps_left_says_that_it_records_none(recipe_file: Path, tmp_path: Path) -> None:
    constant = ("optim.schedule=constant", "optim.warmup=0", "checkpoint.every=2", "log.profile=1")
    run = train(recipe_file, "--out", tmp_path, sets=("optim.steps=3", *constant))
    assert (tmp_path / PROFILE / TABLE).is_file(), run.err
    assert "log.profile" not in run.out
    shutil.rmtree(tmp_path / PROFILE)
    again = train(recipe_file, "--out", tmp_path, sets=("optim.steps=4", *constant))
    assert "log.profile = 1: this start has 1 steps left, and the first 2 are not recorded: none is" in again.out, again.err
    assert not (tmp_path / PROFILE).exists()
