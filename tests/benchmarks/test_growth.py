"""`bench growth` and `bench share`: fits on closed cases, what is planned, how a run's rows are read; slow, both end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megakd.benchmarks import growth, growth_figure, growth_fit, share
from megakd.benchmarks.common import side_by_side
from megakd.benchmarks.growth import Axis, Point
from megakd.benchmarks.growth_material import IMAGES, Material
from megakd.data.patterns import expand
from megakd.recipe.load import load
from support.questions import opened, source

VALUES = (1, 10, 100, 1000)


def row(step: int, **seconds: float) -> dict[str, Any]:
    """A row of metrics.jsonl whose wall time is twice its processor time."""
    return {"step": step, "processor_seconds": seconds, "seconds": {name: 2 * one for name, one in seconds.items()}, "memory_gb": step / 8}


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_a_power_is_found_exactly(exponent: float) -> None:
    fit = growth_fit.power(VALUES, [3 * value**exponent for value in VALUES])
    assert fit.exponent == pytest.approx(exponent, abs=1e-12)
    assert (fit.low, fit.high) == (pytest.approx(exponent, abs=1e-6), pytest.approx(exponent, abs=1e-6))
    assert fit.at(7) == pytest.approx(3 * 7**exponent)
    assert (fit.is_as("flat"), fit.is_as("linear")) == (exponent == 0, exponent == 1)


def test_the_exponents_interval_is_students() -> None:
    """Logarithms 0, 1, 1 over 0, 1, 2: slope 1/2, residuals -1/6, 1/3, -1/6, standard error sqrt(1/6 / 1 / 2), t(0.975, 1) = 12.7062."""
    fit = growth_fit.power([1, math.e, math.e**2], [1, math.e, math.e])
    assert fit.exponent == pytest.approx(0.5)
    assert fit.high - fit.exponent == pytest.approx(12.7062 * math.sqrt(1 / 12), rel=1e-5)
    assert math.isinf(growth_fit.power([1, 2], [1, 1]).high)
    with pytest.raises(ValueError, match="two values at least"):
        growth_fit.power([4, 4], [1, 2])


def test_a_square_is_told_from_a_line() -> None:
    batches = (64, 256, 1024, 4096)
    found = growth_fit.parts(batches, [0.01 + 2e-4 * n + 5e-8 * n**2 for n in batches])
    assert (found.fixed, found.linear, found.quadratic) == (pytest.approx(0.01), pytest.approx(2e-4), pytest.approx(5e-8))
    assert found.crossing == pytest.approx(4000)
    assert found.quadratic_share(4000) == pytest.approx(0.8 / 1.61)
    assert math.isinf(growth_fit.parts(batches, [0.01 + 2e-4 * n for n in batches]).crossing)


def test_the_axes_go_where_they_are_said_to_go() -> None:
    ends = {axis.name: (axis.points[0][0], axis.points[-1][0], axis.expected) for axis in growth.AXES}
    flat = {"shards": (1, 10_000, "flat"), "questions": (1, 1_000_000, "flat"), "ranks": (1, 4, "flat")}
    assert ends == {**flat, "batch": (64, 8192, "linear")}
    assert all(warm_up >= 1 and timed >= 3 for axis in growth.AXES for _, warm_up, timed in axis.points)
    with pytest.raises(ValueError, match="--axis shard: one of shards, questions, ranks, batch"):
        growth.run(["shard"], 1)


def test_the_recipes_name_as_many_shards_and_questions(tmp_path: Path) -> None:
    material = Material.write(tmp_path)
    axes = {axis.name: axis for axis in growth.AXES}

    def loaded(content: dict[str, Any]) -> Any:
        recipe, _ = load(str(side_by_side.write_recipe(content, tmp_path / "recipe.json")))
        assert recipe.log.every == 1
        return recipe

    shards = loaded(axes["shards"].recipe(material, 12))
    names = expand(shards.data.train)
    assert len(names) == 12
    assert len({Path(name).stat().st_ino for name in names}) == 1  # one tar on disk
    assert (shards.optim.batch, shards.data.workers) == (32, 0)
    assert loaded(axes["ranks"].recipe(material, 4)).optim.batch == 128
    assert loaded(axes["batch"].recipe(material, 256)).optim.batch == 256
    assert axes["batch"].config(256) == {"train_micro_batch_size_per_gpu": 128}  # so that the loss's backward is told apart

    asking = loaded(axes["questions"].recipe(material, 40))
    assert asking.active() == {}
    given = asking.answers.train["questions"]
    questions = opened(source("llava", questions=given.questions, images=given.images))
    assert (len(questions), questions[39].text, questions[39].answer) == (40, "what is there ?", "a red circle")
    assert {questions[number].image for number in range(40)} == {f"{number}.jpg" for number in range(IMAGES)}


def test_a_point_is_the_median_of_its_rows_by_part() -> None:
    rows = [row(1, data=1.0, student=5.0, other=1.0), row(2, data=2.0, student=3.0, other=1.0), row(3, data=9.0, student=1.0, other=1.0)]
    found = growth.point("batch", 64, 0, rows, 12.5)
    assert (found.processor, found.wall, found.data, found.student, found.loss) == (7.0, 14.0, 2.0, 3.0, 0.0)
    assert (found.start, found.memory) == (12.5, 3 / 8)


def points(name: str = "shards", exponent: float = 0.0) -> list[Point]:
    parts = dict.fromkeys(growth.PARTS, 0.001)
    return [
        Point(
            name,
            value,
            number,
            0.25 * value**exponent,
            0.5,
            **{**parts, "loss": 0.02 * value**exponent},
            start=8 + value / 500,
            memory=0.5 + value / 4000,
            commit="abc",
        )
        for number in range(2)
        for value in VALUES
    ]


def test_verdicts_and_the_cost_of_a_start() -> None:
    axis = Axis("shards", tuple((value, 1, 1) for value in VALUES), "flat", "32 pairs a step", starts=True)
    flat, start, memory = growth.said(axis, points(), growth.fitted(axis, points()))
    assert "flat (|exponent| <= 0.05) as expected; 1.00 times the time at 1,000 times the shards" in flat
    assert "shards: 1,000 more cost 2e+03 ms of a start's processor time between 100 and 1,000, 2e+03 below: as many for each" in start
    assert "1,000 more cost 250 MB" in memory
    assert "NOT as expected" in growth.said(axis, points(exponent=0.2), growth.fitted(axis, points(exponent=0.2)))[0]


def test_a_batchs_exponent_is_that_of_all_but_the_loss_whose_square_is_told_beside() -> None:
    axis = Axis("batch", tuple((value, 1, 1) for value in VALUES), "linear", "one rank, without the loss")
    parts = dict.fromkeys(growth.PARTS, 0.0)
    square = {value: 1e-6 * value**2 for value in VALUES}
    runs = [
        Point("batch", value, 0, 2e-3 * value + loss, 1.0, **{**parts, "loss": loss}, start=9, memory=1, commit="")
        for value, loss in square.items()
    ]
    verdict, rest, loss, step = growth.said(axis, runs, growth.fitted(axis, runs))
    assert "a step grows as batch ^ +1.000" in verdict
    assert "as expected" in verdict
    assert "NOT" not in verdict
    assert rest.startswith("all but the loss = 0.0 ms + 2000.0 us N + 0.00 ns N^2")
    assert "the loss = 0.0 ms + 0.0 us N + 1000.00 ns N^2; at N = 1,000 the square is 100% of it" in loss
    assert "the square is 33% of it, and as much as N at 2,000" in step


def test_the_table_on_disk_comes_back_and_is_drawn(tmp_path: Path) -> None:
    assert growth.read(tmp_path / "growth.csv") == []
    written = [*points(), *points("batch", 1.0)]
    growth.write(written, tmp_path / "growth.csv")
    assert growth.read(tmp_path / "growth.csv") == written
    drawn = growth_figure.draw({"shards": ("flat", "32 pairs a step"), "batch": ("linear", "one rank")}, written, tmp_path)
    svg, png = (path.read_bytes() for path in drawn)
    assert b"shards (32 pairs a step): flat" in svg
    assert b"exponent +1.000 [" in svg
    assert b"<dc:date>" not in svg  # the same points are the same file
    assert png.startswith(b"\x89PNG")


def test_the_share_is_what_no_tower_takes() -> None:
    rows = [row(1, data=1.0, teacher=0.5, student=7.5, loss=0.5, other=0.5), row(2, student=9.0, loss=1.0), row(3, student=8.0, update=2.0)]
    assert share.share([rows[:1]], "seconds") == pytest.approx(0.2)
    assert share.share([rows[:2], rows[2:]], "processor_seconds") == pytest.approx(0.2)
    assert share.share([rows[1:2]], "seconds", student=0.75) == pytest.approx(1 / 7.75)
    with pytest.raises(ValueError, match=r"--batch 100: a multiple of 2 ranks x --micro_batch 64"):
        share.run(1, 100, 1, 64)


@pytest.mark.slow
def test_growth_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    smallest = {"shards": (1, 2, 3), "questions": (1, 25, 50), "ranks": (1, 2), "batch": (64, 128)}
    axes = [
        Axis(axis.name, tuple((value, 1, 3) for value in smallest[axis.name]), axis.expected, axis.holds, axis.starts)
        for axis in growth.AXES
    ]
    monkeypatch.setattr(growth, "AXES", axes)
    growth.run([], 1, 1, tmp_path / "out", tmp_path / "growth.json")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"growth.csv", "growth.svg", "growth.png"}
    found = growth.read(tmp_path / "out" / "growth.csv")
    assert {(point.axis, point.value) for point in found} == {(name, value) for name, values in smallest.items() for value in values}
    for point in found:
        assert point.start > 1  # torch's import alone
        assert 0 < point.memory < 16
        assert point.data > 0
        assert point.processor >= point.student > 0
    assert set(json.loads((tmp_path / "growth.json").read_text())["exponents"]) == set(smallest)
    capsys.readouterr()
    growth.run(["ranks"], 1, 1, tmp_path / "out")
    again = growth.read(tmp_path / "out" / "growth.csv")
    assert [point for point in again if point.axis != "ranks"] == [point for point in found if point.axis != "ranks"]
    said = capsys.readouterr().out
    assert "ranks" in said
    assert "as expected" in said  # a verdict, or its contrary


@pytest.mark.slow
def test_share_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "SMALL", {**share.STORED, "embed_dim": 16})
    share.run(1, 16, 2, 4, file=tmp_path / "share.json")
    found = json.loads((tmp_path / "share.json").read_text())
    assert len(found["rows"]) == 2
    for one in found["rows"]:
        assert set(one["seconds"]) == set(share.PARTS)
        assert one["processor_seconds"]["student"] > 0
    assert 0 < found["share"]["wall"] < 1
    assert found["reached"] == (max(found["by_round"]["wall"]) <= share.LIMIT)
