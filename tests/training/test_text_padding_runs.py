"""Runs whose texts are padded to the longest of each batch learn what runs with whole texts learn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megakd.recipe import load as recipes
from megakd.teachers.replicated import ReplicatedTeacher
from support.runs import KD, TRAIN, ds_config, losses, ran, run_ranks, settings, train
from support.stores import write_stores

LONGEST = ("student.text_padding=longest", "teacher.text_padding=longest")
CONTEXT = tuple(f"{role}.architecture.text_cfg.context_length=48" for role in ("student", "teacher"))
SHORT = (*KD, *CONTEXT, "optim.steps=3", "optim.batch=4", "optim.warmup=0", "log.every=1", "evaluation={}")


def test_a_run_learns_the_same_from_shorter_texts(recipe_file: Path, tmp_path: Path) -> None:
    whole = ran(recipe_file, tmp_path / "whole", *SHORT)
    shorter = ran(recipe_file, tmp_path / "shorter", *SHORT, *LONGEST)
    assert losses(shorter) == pytest.approx(losses(whole), rel=1e-4)
    shown = train(recipe_file, "--dry_run", "--out", tmp_path / "none", sets=[*SHORT, *LONGEST])
    assert shown.code == 0, shown.err
    assert "texts of student, teacher are padded to the longest of a batch" in shown.out
    lengths = re.findall(r"tokens \((\d+),\)", shown.out)  # of the first batch
    assert len(lengths) == 2
    assert all(int(length) < 48 and int(length) % 8 == 0 for length in lengths), shown.out


def test_what_a_store_lacks_is_taught_from_shorter_texts_too(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = recipes.load(str(recipe_file), (*SHORT, *LONGEST))
    folder = write_stores(recipe, tmp_path / "stores")
    shown = train(recipe_file, "--out", tmp_path / "run", sets=[*SHORT, *LONGEST, f"teacher.store={folder / 'fp32'}"])
    assert "texts of student are padded to the longest of a batch" in shown.out, shown.err
    lengths: list[int] = []
    embed = ReplicatedTeacher.embed
    monkeypatch.setattr(
        ReplicatedTeacher,
        "embed",
        lambda self, pixels, tokens, *more: (lengths.append(tokens.shape[1]), embed(self, pixels, tokens, *more))[1],
    )
    missed = ran(recipe_file, tmp_path / "missed", *SHORT, *LONGEST, f"teacher.store={folder / 'empty'}")
    assert losses(missed) == pytest.approx(losses(tmp_path / "run"), rel=1e-4)
    assert 0 < max(lengths) < 48


@pytest.mark.slow
def test_partitioned_towers_take_shorter_texts_too(recipe_file: Path, tmp_path: Path) -> None:
    """ZeRO-3 gathers what a text tower reads beside its blocks, of the student and of the teacher, though ranks have other lengths."""
    stage3 = ds_config(tmp_path / "stage3.json", zero_optimization={"stage": 3})
    for name, more in {"whole": (), "shorter": LONGEST}.items():
        sets = settings(*SHORT, "teacher.mode=zero3", *more)
        run_ranks(TRAIN, "--recipe", recipe_file, "--ds_config", stage3, "--out", tmp_path / name, *sets)
    assert losses(tmp_path / "shorter") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
