"""Twelve steps of each golden run have the numbers that an earlier commit wrote down."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest

from support.golden import RUNS, differences, digest, golden, machine, make_workplace, measured, run

ADVICE = "what is computed has changed; if it had to, renew with `make golden` and say why in the commit (tests/golden/README.md)"


@pytest.mark.parametrize("name", RUNS)
def test_losses_gradient_norms_and_scores_are_the_golden_ones(name: str, workplace: Path) -> None:
    expected = golden(name)
    exact = expected["machine"] == machine()
    found = differences(expected, measured(run(name, workplace, f"out/{name}")), exact=exact)
    assert not found, "\n".join((f"compared {'to the last bit' if exact else 'as numbers of another machine'}:", *found, ADVICE))


def test_the_world_is_byte_for_byte_the_one_of_the_golden_numbers(tmp_path: Path) -> None:
    written = digest(make_workplace(tmp_path, runs=None) / "data" / "shapes")
    assert {name: golden(name)["world_sha256"] for name in RUNS} == dict.fromkeys(RUNS, written)


def test_one_bit_of_one_number_is_a_difference_on_the_same_machine_alone() -> None:
    expected = golden("one_rank")
    found = copy.deepcopy(expected)
    found["curve"]["gradient_norm"][7] = math.nextafter(found["curve"]["gradient_norm"][7], math.inf)
    (line,) = differences(expected, found, exact=True)
    assert line.startswith("gradient_norm: ")
    assert "at step 8" in line
    assert differences(expected, found, exact=False) == []


@pytest.mark.parametrize(("factor", "lines"), [(1 + 0.9e-4, 0), (1 + 1.1e-4, 1), (math.nan, 1)])
def test_another_machine_may_be_one_in_ten_thousand_off(factor: float, lines: int) -> None:
    expected = golden("one_rank")
    found = copy.deepcopy(expected)
    found["curve"]["losses.similarity"][11] *= factor
    assert len(differences(expected, found, exact=False)) == lines


@pytest.mark.parametrize(("key", "by", "lines"), [("top1", 0.09, 0), ("top1", 0.11, 1), ("images", 1, 1)])
def test_another_machine_may_turn_few_scores_and_no_count(key: str, by: float, lines: int) -> None:
    expected = golden("one_rank")
    found = copy.deepcopy(expected)
    found["scores"][f"zero_shot.seen.{key}"] += by
    assert len(differences(expected, found, exact=False)) == lines


def test_a_loss_that_is_missing_or_new_and_a_shorter_curve_are_differences() -> None:
    expected = golden("one_rank")
    found = copy.deepcopy(expected)
    found["curve"]["losses.other"] = found["curve"].pop("losses.similarity")
    del found["curve"]["loss"][-1]
    assert len(differences(expected, found, exact=False)) == 3
