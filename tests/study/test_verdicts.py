"""Verdicts on pre-registered hypotheses: closed cases of each measure, and when one is open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megakd.pages.tables import Table
from megakd.study.report.page import compose
from megakd.study.report.summary import Summary
from megakd.study.report.verdicts import Verdict, judged
from megakd.study.results import read_study
from support.study_folders import PLAIN, write_study

TEACHERS = ("T1", "T2", "T3", "T4")


def score(teacher: str | None, method: str, seed: int) -> float:
    """`up` follows its teachers, `down` the other way, `flat` has up's mean over the teachers; seeds are a common shift and a hair."""
    strength = TEACHERS.index(teacher) if teacher else 0
    rise = {"up": 0.02 * strength, "down": -0.02 * strength, "flat": 0.03}.get(method, 0.0)
    return 0.5 + rise + 0.001 * seed + 0.0002 * ((seed * seed + 2 * strength * seed + len(method) * (seed + 1)) % 5)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def status(teacher: str | None, method: str, seed: int) -> tuple[str, str]:
        if method == "late" and seed == 2:
            return "missing", ""
        return ("failed", "nan") if (teacher, method, seed) == ("T1", "lost", 0) else ("done", "")

    methods = ("up", "down", "flat", "late", "lost")
    return write_study(tmp_path_factory.mktemp("verdicts") / "study", score, teachers=TEACHERS, methods=methods, status=status)


def verdict(study: Path, **entry: Any) -> Verdict:
    found = judged(Summary(read_study(study)), {"threshold": 0.0, **entry})
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("entry", "holds"),
    [
        ({"measure": "order", "method": "up", "threshold": 0.8}, True),
        ({"measure": "order", "method": "down", "threshold": 0.8}, False),
        ({"measure": "order", "method": "up", "threshold": 1.0}, False),  # nothing exceeds 1
        ({"measure": "order_difference", "method": "up", "against": "down"}, True),
        ({"measure": "order_difference", "method": "down", "against": "up"}, False),
        ({"measure": "gain", "method": "up", "against": PLAIN, "threshold": 0.02}, True),
        ({"measure": "gain", "method": "up", "against": PLAIN, "threshold": 0.04}, False),
        ({"measure": "gain", "method": "up", "against": "flat"}, None),
        ({"measure": "gain", "method": "up", "against": PLAIN, "threshold": 0.05, "only": {"teachers": ["T4"]}}, True),
        ({"measure": "no_difference", "method": "up", "against": "flat", "threshold": 0.002}, True),
        ({"measure": "no_difference", "method": "up", "against": "down", "threshold": 0.002}, False),
        ({"measure": "gain", "method": "up", "against": "up", "only": {"teachers": ["T4"]}, "against_only": {"teachers": ["T4"]}}, None),
    ],
)
def test_a_hypothesis_is_judged_by_the_whole_interval(entry: dict[str, Any], holds: bool | None, study: Path) -> None:
    assert verdict(study, **entry).holds is holds


def test_a_gain_counts_a_seed_once_with_the_mean_over_its_teachers(study: Path) -> None:
    found = verdict(study, measure="gain", method="up", against=PLAIN).found
    assert found is not None
    gains = [sum(score(name, "up", seed) - score(None, PLAIN, seed) for name in TEACHERS) / 4 for seed in range(3)]
    assert found.value == pytest.approx(sum(gains) / 3, abs=1e-12)
    assert found.n == 3


def test_one_teacher_may_be_held_against_another_seed_by_seed(study: Path) -> None:
    sides = {"only": {"teachers": ["T4"]}, "against_only": {"teachers": ["T1", "T2"]}}
    found = verdict(study, measure="gain", method="up", against="up", **sides).found
    assert found is not None
    gains = [score("T4", "up", seed) - (score("T1", "up", seed) + score("T2", "up", seed)) / 2 for seed in range(3)]
    assert found.value == pytest.approx(sum(gains) / 3, abs=1e-12)
    assert found.n == 3


def test_a_hypothesis_is_open_while_a_cell_of_it_is_to_come_and_counts_those_that_failed(study: Path) -> None:
    late = verdict(study, measure="gain", method="late", against=PLAIN)
    assert (late.holds, late.found, late.said) == (None, None, "open: 4 of its 15 cells are still to come")
    assert verdict(study, measure="gain", method="late", against=PLAIN, only={"seeds": [0, 1]}).found is not None
    assert verdict(study, measure="gain", method="lost", against=PLAIN).said == "14 of 15 cells"
    assert verdict(study, measure="order", method="nobody").said == "open: the study has no such cells"


UNKNOWN = [{}, {"measure": "order"}, {"measure": "else", "method": "up"}, {"measure": "gain", "method": "up", "threshold": "x"}]


@pytest.mark.parametrize("entry", UNKNOWN)
def test_what_is_no_known_measure_is_not_judged(entry: dict[str, Any], study: Path) -> None:
    assert judged(Summary(read_study(study)), {"threshold": 0.1, **entry}) is None


def test_the_table_says_measure_interval_and_verdict_and_keeps_a_studys_own(tmp_path: Path) -> None:
    common = {"prediction": "p", "threshold": 0.02}
    more = {
        "hypotheses": [
            {"name": "a", "measure": "gain", "method": "up", "against": PLAIN, **common},
            {"name": "b", "measure": "no_difference", "method": "up", "against": "up", **common},
            {"name": "c", "measure": "by hand", "verdict": {"holds": True, "value": 0.25, "text": "as seen"}, **common},
            {"name": "d", "measure": "by hand", **common},
        ]
    }
    folder = write_study(tmp_path / "study", score, teachers=TEACHERS, methods=("up",), more=more)
    section = next(section for section in compose(read_study(folder), []).sections if section.key == "hypotheses")
    (table,) = section.parts
    assert isinstance(table, Table)
    first, second, third, fourth = ([cell.text for cell in row] for row in table.rows)
    assert first[2:4] == ["gain: up against none", "0.02"]
    assert first[4].startswith("holds: +3.0 points (+2.")
    assert second[4] == "undecided: +0.0 points, 24 cells; all 3 differences are equal: their spread is unknown"
    assert third[4] == "holds: value 0.25, as seen"
    assert fourth[4] == "open"
