"""Runs whose weights and temperatures move: what each step goes by is what is logged, over micro-batches and after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megakd.models.embeddings import Embeddings
from megakd.objectives.set import ObjectiveSet
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint
from support.runs import ENSEMBLE, KD, TINY_LLAMA, answering, curve, ds_config, losses, ran, rows, train

SCHEDULED = (
    *KD,
    *ENSEMBLE,
    "objectives.similarity=0",
    "schedules.objectives.similarity={ shape = 'linear', end = 2.0, to_step = 4 }",
    "schedules.objectives.feature={ shape = 'cosine', end = 0.0, from_step = 2, to_step = 5 }",
    "schedules.similarity.temperature={ shape = 'linear', start = 2.0, end = 0.5, to_step = 3 }",
    "schedules.similarity.teacher_temperature={ shape = 'constant', start = 0.7 }",
    "schedules.ensemble.second.weight={ shape = 'linear', start = 0.0, end = 3.0, from_step = 1, to_step = 3 }",
    "checkpoint.keep=9",
)


@pytest.fixture(scope="module")
def whole(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(recipe_file, tmp_path_factory.mktemp("scheduled") / "whole", *SCHEDULED)


def test_each_row_has_the_values_of_its_step_and_their_sum(whole: Path, recipe_file: Path) -> None:
    recipe, _ = recipes.load(str(recipe_file), SCHEDULED)
    assert [row["scheduled"]["objectives.similarity"] for row in rows(whole)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert [row["scheduled"]["ensemble.second.weight"] for row in rows(whole)] == [0.0, 0.0, 1.5, 3.0, 3.0, 3.0]
    for step, row in enumerate(rows(whole)):
        assert row["scheduled"] == {key: recipe.value_at(key, step) for key in recipe.schedules}
        weights = {"contrastive": 1.0, **{name: row["scheduled"][f"objectives.{name}"] for name in ("similarity", "feature")}}
        assert row["loss"] == pytest.approx(sum(weight * row["losses"][name] for name, weight in weights.items()), rel=1e-6)


def test_a_resumed_run_is_the_undisturbed_one_to_the_last_bit(whole: Path, recipe_file: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "half")
    for path in checkpoint.available(tmp_path / "half")[1:]:
        shutil.rmtree(path)
    ran(recipe_file, tmp_path / "half", *SCHEDULED)
    assert curve(tmp_path / "half") == curve(whole)


def test_micro_batches_change_nothing(whole: Path, recipe_file: Path, tmp_path: Path) -> None:
    micro = ran(recipe_file, tmp_path / "micro", *SCHEDULED, config=ds_config(tmp_path / "ds.json", train_micro_batch_size_per_gpu=4))
    for row, expected in zip(rows(micro), rows(whole), strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)


def test_constant_schedules_have_the_bits_of_the_keys_they_stand_for(recipe_file: Path, tmp_path: Path) -> None:
    plain = ran(recipe_file, tmp_path / "plain", *KD, "similarity.temperature=2.0")
    told = "schedules.similarity.temperature={ shape = 'constant', start = 2.0 }"
    weight = "schedules.objectives.similarity={ shape = 'constant' }"
    assert curve(ran(recipe_file, tmp_path / "scheduled", *KD, told, weight)) == curve(plain)


def test_the_losses_go_by_the_steps_own_temperatures_and_weights(recipe_file: Path) -> None:
    """Each against a set whose recipe has these values in every step."""
    recipe, _ = recipes.load(str(recipe_file), SCHEDULED)
    moving = ObjectiveSet(recipe, torch.device("cpu"), None)

    def pair(seed: int, width: int) -> Embeddings:
        generator = torch.Generator().manual_seed(seed)
        image, text = (torch.nn.functional.normalize(torch.randn(9, width, generator=generator), dim=-1) for _ in range(2))
        return Embeddings(image, text, torch.tensor(20.0))

    student, teachers = pair(1, 16), [pair(3, 24), pair(5, 20)]
    student = student._replace(projected={"feature": (pair(7, 24).image, pair(8, 24).image), "feature1": (pair(9, 20).image,) * 2})
    for step in range(6):
        fixed = [f"{key}={value}" for key in recipe.schedules if (value := recipe.value_at(key, step)) or "temperature" not in key]
        kept, _ = recipes.load(str(recipe_file), (*KD, *ENSEMBLE, *[one for one in fixed if not one.startswith("objectives")]))
        ones = slice(None) if kept.value_at("ensemble.second.weight", 0) else slice(1)
        expected = ObjectiveSet(kept, torch.device("cpu"), None).losses(student, teachers[ones], step)
        torch.testing.assert_close(moving.losses(student, teachers, step), expected)
        assert moving.weights_at(step)["similarity"] == recipe.value_at("objectives.similarity", step)


def test_the_run_and_the_dry_run_say_what_moves(recipe_file: Path, tmp_path: Path) -> None:
    shown = train(recipe_file, "--dry_run", sets=SCHEDULED)
    assert shown.code == 0, shown.err
    said = train(recipe_file, "--out", tmp_path / "run", sets=(*SCHEDULED, "optim.steps=3"))
    for text in (shown.out, said.out):
        assert "scheduled: objectives.similarity: 0 to 2, linear, from step 0 to 4" in text
        assert "scheduled: similarity.teacher_temperature: 0.7 in every step" in text


def test_a_scheduled_temperature_is_refused_where_each_would_be_compiled(recipe_file: Path) -> None:
    recipe, _ = recipes.load(str(recipe_file), (*SCHEDULED, "kernels.backend=compiled"))
    with pytest.raises(ValueError, match=r"kernels\.backend = 'compiled': would compile anew for each value of schedules\.similarity"):
        ObjectiveSet(recipe, torch.device("cpu"), None)


def test_the_answers_weight_moves_beside_the_objectives(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    decoder = (f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer", *answering(world), "evaluation={}")
    moves = "schedules.answers.weight={ shape = 'linear', start = 0.0, end = 3.0, to_step = 2 }"
    run = ran(recipe_file, tmp_path / "run", *decoder, moves, "optim.steps=4")
    assert [row["scheduled"] for row in rows(run)] == [{"answers.weight": value} for value in (0.0, 1.5, 3.0, 3.0)]
    for row in rows(run):
        expected = row["losses"]["contrastive"] + row["scheduled"]["answers.weight"] * row["losses"]["answer"]
        assert row["loss"] == pytest.approx(expected, rel=1e-6)
    assert losses(run)[0] == rows(run)[0]["losses"]["contrastive"]
