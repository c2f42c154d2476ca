"""`[schedules]`: the value in each step, names with and without quotes, and every mistake in one message."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megakd.recipe import Objectives, Recipe, Schedule
from megakd.recipe import load as recipes
from megakd.recipe.schedules import schedulable
from support.runs import ENSEMBLE, KD

STEPS = 6  # of the tiny recipe


def _load(recipe_file: Path, *overrides: str) -> Recipe:
    return recipes.load(str(recipe_file), overrides)[0]


def test_a_value_stays_moves_between_two_steps_and_stays() -> None:
    linear = Schedule(shape="linear", start=1.0, end=3.0, from_step=2, to_step=6)
    assert [linear.at(step, 9.0, 100) for step in range(9)] == [1.0, 1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0]
    cosine = linear.model_copy(update={"shape": "cosine"})
    assert [cosine.at(step, 9.0, 100) for step in (0, 2, 6, 50)] == [1.0, 1.0, 3.0, 3.0]
    assert cosine.at(4, 9.0, 100) == pytest.approx(2.0)
    assert cosine.at(3, 9.0, 100) == pytest.approx(1.0 + (1 - math.cos(math.pi / 4)))
    assert [Schedule(shape="constant", start=0.3).at(step, 9.0, 100) for step in (0, 50)] == [0.3, 0.3]


def test_it_starts_from_the_keys_own_value_and_ends_with_the_run_where_nothing_else_is_said() -> None:
    down = Schedule(shape="linear", end=0.0)
    assert [down.at(step, 2.0, 8) for step in (0, 2, 4, 7, 8)] == [2.0, 1.5, 1.0, 0.25, 0.0]
    assert Schedule(shape="constant").at(5, 2.0, 8) == 2.0
    # exactly at its ends, whatever the rounding between them
    odd = Schedule(shape="cosine", start=0.1, end=0.7, to_step=3)
    assert (odd.at(0, 0.0, 9), odd.at(3, 0.0, 9)) == (0.1, 0.7)


@pytest.mark.parametrize(
    "overrides",
    [
        ('schedules."similarity.temperature"={ shape = "linear", end = 4.0, to_step = 4 }',),
        ('schedules.similarity.temperature={ shape = "linear", end = 4.0, to_step = 4 }',),
        ('schedules."similarity.temperature"={ shape = "linear", end = 9.0, to_step = 4 }', "schedules.similarity.temperature.end=4.0"),
        (
            "schedules.similarity.temperature.shape=linear",
            "schedules.similarity.temperature.end=4",
            "schedules.similarity.temperature.to_step=4",
        ),
    ],
)
def test_names_are_written_with_and_without_quotes(recipe_file: Path, overrides: tuple[str, ...], tmp_path: Path) -> None:
    recipe = _load(recipe_file, *overrides)
    assert recipe.schedules == {"similarity.temperature": Schedule(shape="linear", end=4.0, to_step=4)}
    assert [recipe.value_at("similarity.temperature", step) for step in (0, 2, 4)] == [1.0, 2.5, 4.0]
    assert recipe.section_at("similarity", 2) == recipe.similarity.model_copy(update={"temperature": 2.5})
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    assert _load(tmp_path / "run.json") == recipe


def test_every_weight_and_temperature_can_be_scheduled(recipe_file: Path) -> None:
    answers = "answers.train.a={ format = 'llava', questions = 'q' }"
    decoder = ("decoder.model=x", answers, "answers.teacher.bundle=RUN/bundle")
    found = schedulable(_load(recipe_file, *KD, *ENSEMBLE, *decoder))
    assert {f"objectives.{name}" for name in Objectives.model_fields} <= found.keys()
    expected = {"similarity.temperature", "similarity.teacher_temperature", "teacher.weight", "ensemble.second.weight", "answers.weight"}
    assert expected | {"answers.teacher.weight", "answers.teacher.temperature"} <= found.keys()


def test_an_objective_whose_weight_rises_from_zero_is_active_and_needs_its_teacher(recipe_file: Path) -> None:
    rising = "schedules.objectives.similarity={ shape = 'linear', end = 2.0 }"
    recipe = _load(recipe_file, *KD, "objectives.similarity=0", rising)
    assert recipe.active() == {"contrastive": 1.0, "similarity": 2.0, "feature": 0.5}
    assert "similarity" in recipe.in_need_of_a_teacher()
    falling = _load(recipe_file, *KD, "schedules.objectives.similarity={ shape = 'linear', end = 0.0 }")
    assert falling.active()["similarity"] == 2.0


def test_a_teacher_whose_weight_rises_from_zero_is_loaded(recipe_file: Path) -> None:
    recipe = _load(
        recipe_file, *KD, *ENSEMBLE, "ensemble.second.weight=0", "schedules.ensemble.second.weight={ shape = 'linear', end = 3.0 }"
    )
    assert list(recipe.weighted_teachers()) == ["teacher", "ensemble.second"]
    assert recipe.teacher_weights(0) == [1.0, 0.0]
    assert recipe.teacher_weights(2) == [1.0, 1.0]
    assert not recipe.weighs_teachers_alike()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("optim.lr={ shape = 'linear', end = 1.0 }",), "schedules.optim.lr: this recipe has no weight or temperature of that name"),
        (("objectives.similarty={ shape = 'linear', end = 1.0 }",), "did you mean 'objectives.similarity'?"),
        (
            ("answers.weight={ shape = 'linear', end = 1.0 }",),
            "schedules.answers.weight: this recipe has no weight or temperature of that name",
        ),
        (("feature.head={ shape = 'linear', end = 1.0 }",), "schedules.feature.head: this recipe has no weight"),
        (("similarity.temperature={ shape = 'cosin', end = 1.0 }",), "schedules.similarity.temperature.shape = 'cosin'"),
        (("similarity.temperature={ shape = 'linear', ende = 1.0 }",), "did you mean 'schedules.similarity.temperature.end'?"),
        (("similarity.temperature={ end = 1.0 }",), "schedules.similarity.temperature.shape: missing"),
        (("similarity.temperature={ shape = 'linear' }",), "shape = 'linear' needs the value that it moves to: give `end`"),
        (
            ("similarity.temperature={ shape = 'constant', end = 2.0, to_step = 3 }",),
            "a constant schedule does not move: take end, to_step out",
        ),
        (("similarity.temperature={ shape = 'linear', end = 0 }",), "schedules.similarity.temperature.end = 0: above 0 at every step"),
        (("similarity.temperature={ shape = 'linear', end = nan }",), "not a finite number"),
        (("objectives.similarity={ shape = 'linear', end = -1 }",), "schedules.objectives.similarity.end = -1: at least 0 at every step"),
        (("objectives.feature={ shape = 'linear', start = 0, end = 0 }",), "schedules.objectives.feature: 0 in every step"),
        (
            ("similarity.teacher_temperature={ shape = 'linear', end = 2.0 }",),
            "schedules.similarity.teacher_temperature: the key has no value of its own to start from: give `start`",
        ),
        (
            ("objectives.similarity={ shape = 'linear', end = 1, from_step = 4, to_step = 4 }",),
            "from_step = 4 does not come before to_step = 4",
        ),
        (("objectives.similarity={ shape = 'linear', end = 1, from_step = 6 }",), "from_step = 6 does not come before optim.steps = 6"),
        (("similarity=3",), "schedules.similarity = 3"),
        (
            (
                "teacher.weight={ shape = 'linear', end = 0.0, to_step = 3 }",
                "ensemble.second.weight={ shape = 'linear', start = 0.0, end = 1.0, from_step = 3 }",
            ),
            "schedules: at step 3 the weight of every teacher is 0; keep one of them above 0 in each step",
        ),
    ],
)
def test_a_mistaken_schedule_is_one_message(recipe_file: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match="recipe") as caught:
        _load(recipe_file, *KD, *ENSEMBLE, *(f"schedules.{setting}" for setting in settings))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_a_run_does_not_go_on_with_another_schedule_nor_with_more_steps_where_one_ends_with_them(recipe_file: Path) -> None:
    constant = (*KD, "optim.schedule=constant")
    plain, ending = _load(recipe_file, *constant), "schedules.similarity.temperature={ shape = 'linear', end = 4.0 }"
    old = _load(recipe_file, *constant, ending)
    assert "schedules.similarity.temperature.end: None -> 4.0" in recipes.refused(plain, old)
    assert len(recipes.refused(old, _load(recipe_file, *constant, ending, "schedules.similarity.temperature.end=3"))) == 1
    (line,) = recipes.refused(old, _load(recipe_file, *constant, ending, f"optim.steps={STEPS + 3}"))
    assert "optim.steps: 6 -> 9 (schedules.similarity.temperature moves until then: give it a to_step)" in line
    fixed = (*constant, ending, "schedules.similarity.temperature.to_step=4")
    assert recipes.refused(_load(recipe_file, *fixed), _load(recipe_file, *fixed, "optim.steps=9")) == []
