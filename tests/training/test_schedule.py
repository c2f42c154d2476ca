"""The learning rate of each update, and that it is the one the optimizer uses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megakd.recipe import Optim
from megakd.training.optim import learning_rate
from support.runs import rows, train


def test_warmup_rises_in_equal_steps_to_lr() -> None:
    optim = Optim(steps=20, batch=8, lr=0.4, warmup=4)
    assert [learning_rate(optim, step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_the_cosine_is_half_way_in_the_middle_and_ends_near_the_final_rate() -> None:
    optim = Optim(steps=104, batch=8, lr=2.0, warmup=4, final_lr=0.1)
    assert learning_rate(optim, 4) == 2.0
    assert learning_rate(optim, 54) == pytest.approx(2.0 * 0.55)
    assert learning_rate(optim, 104) == pytest.approx(0.2)
    rates = [learning_rate(optim, step) for step in range(4, 104)]
    assert rates == sorted(rates, reverse=True)
    assert rates[25] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))


def test_a_constant_schedule_stays() -> None:
    optim = Optim(steps=20, batch=8, lr=0.5, warmup=2, schedule="constant")
    assert [learning_rate(optim, step) for step in (0, 1, 2, 19)] == [0.25, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 0.75), ("cosine", 0.5 * (1 + math.cos(math.pi / 4))), ("sqrt", 0.5)])
def test_a_cooldown_falls_from_lr_to_the_final_rate_over_its_steps_alone(shape: str, quarter: float) -> None:
    optim = Optim(steps=20, batch=8, lr=2.0, warmup=4, schedule="wsd", cooldown=8, cooldown_shape=shape, final_lr=0.1)  # type: ignore[arg-type]
    rates = [learning_rate(optim, step) for step in range(21)]
    assert rates[3:13] == [2.0] * 10, "the first update of the cooldown still has lr, as the cosine's"
    assert rates[14] == pytest.approx(2.0 * (0.1 + 0.9 * quarter))
    assert rates[20] == pytest.approx(0.2)
    assert rates[12:] == sorted(rates[12:], reverse=True)


def test_a_cooldown_may_begin_where_the_warmup_ends() -> None:
    optim = Optim(steps=4, batch=8, lr=1.0, warmup=2, schedule="wsd", cooldown=2)
    assert [learning_rate(optim, step) for step in range(4)] == [0.5, 1.0, 1.0, 0.5]


def test_more_steps_leave_the_stable_part_as_it_was() -> None:
    short, long = (Optim(steps=steps, batch=8, lr=1.0, warmup=2, schedule="wsd", cooldown=5) for steps in (20, 50))
    assert [learning_rate(short, step) for step in range(16)] == [learning_rate(long, step) for step in range(16)]


def test_no_warmup_starts_at_lr() -> None:
    assert learning_rate(Optim(steps=10, batch=8, lr=0.5), 0) == 0.5


def test_the_rate_that_is_logged_is_the_one_that_moves_the_weights(recipe_file: Path, tmp_path: Path) -> None:
    sets = ("optim.steps=5", "optim.warmup=2", "optim.lr=0.3", "optim.eps=1e-9")
    finished = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert finished.code == 0, finished.err
    optim = Optim(steps=5, batch=16, lr=0.3, warmup=2)
    assert [row["lr"] for row in rows(tmp_path / "run")] == [learning_rate(optim, step) for step in range(5)]
    # The scale's first AdamW update is lr * g / (|g| + eps): its direction times the learning rate of that step.
    scales = [row["scale"] for row in rows(tmp_path / "run")]
    assert abs(math.log(scales[1] / scales[0])) == pytest.approx(0.15, rel=0.01)
