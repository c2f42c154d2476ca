"""What the head of a run's page says of it, from the files of its folder alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megakd.pages.page import BAD, GOOD, LOOK, Table, as_markdown
from megakd.pages.run import contents, curves, health, models, reading
from megakd.pages.run.page import compose
from support import edit_json
from support.run_pages import STEPS, row, write_long_run, write_rows


def checks(folder: Path) -> dict[str, tuple[str, str]]:
    return {check.what: (check.mark, check.said) for check in health.checks(reading.read(folder))}


def cells(table: Table) -> list[list[str]]:
    return [[cell.text for cell in cells_of_row] for cells_of_row in table.rows]


def last_start(folder: Path, **ended: Any) -> None:
    """How the last start ended, or that it left no word."""
    edit_json(folder / "run.json", lambda run: run["jobs"][-1].update(ended=ended or None))


def test_a_run_that_is_well_has_every_check_good_and_its_scores_in_front(tmp_path: Path) -> None:
    run = reading.read(write_long_run(tmp_path / "run"))
    assert health.verdict(run) == (f"Finished: {STEPS} steps", GOOD)
    assert health.sentences(run) == ()
    assert health.scores(run) == (("40.0 %", "VQA test"), ("30.0 %", "retrieval test, mean R@1"))
    found = checks(tmp_path / "run")
    assert list(found) == ["Loss", "Gradients", "Evaluations", "Data", "Dropped", "Speed"]
    assert {mark for what, (mark, _) in found.items() if what != "Dropped"} == {GOOD}
    assert found["Loss"][1] == "fell from 5.81 to 3.11"
    assert found["Evaluations"][1] == "VQA test: 10.0 % at step 10, 40.0 % at step 40, of 4"
    assert found["Data"][1] == "10 % of the time is spent waiting for it"
    assert found["Dropped"] == (LOOK, "4 samples, 1 % of those that were taken")
    assert health.about(run) == "Recipe long: contrastive + 2 similarity, from ViT-B-32, into ViT-S-32, on pairs/*.tar, in 40 steps of 10."


@pytest.mark.parametrize(
    ("what", "mark", "changed", "said"),
    [
        ("Loss", LOOK, lambda step: {"loss": 5.0 + step}, "did not fall: 7.5 at first, 43.5 at last"),
        ("Loss", BAD, lambda step: {"loss": None} if step == STEPS else {}, "is not finite in the last row, of step 40"),
        ("Gradients", BAD, lambda step: {"gradient_norm": None} if step == STEPS else {}, "not finite in the last row, of step 40"),
        ("Gradients", LOOK, lambda step: {"gradient_norm": 90.0} if step == 31 else {}, "norm 90 at step 31, 82 times the median"),
        ("Gradients", GOOD, lambda step: {"gradient_norm": 90.0} if step == 1 else {}, "1.2 at most after the first fifth"),
        ("Logit scale", LOOK, lambda step: {"scale": 100.0}, "100, at its ceiling (student.max_scale = 100)"),
        ("Data", LOOK, lambda step: {"seconds": {"data": 0.2, "student": 0.2}}, "50 % of the time is spent waiting for it: raise"),
        ("Speed", LOOK, lambda step: {"images_per_second": 100 - 80 * (step > 32)}, "20 images/s in the last fifth, 100 in the median"),
        ("Dropped", GOOD, lambda step: {"bad_samples": {}}, "no sample"),
    ],
)  # fmt: skip
def test_what_is_not_well_is_marked_with_its_numbers(what: str, mark: str, changed: Any, said: str, tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run")
    write_rows(folder, [row(step, **changed(step)) for step in range(1, STEPS + 1)])
    found = checks(folder)[what]
    assert found[0] == mark
    assert said in found[1]


def test_a_score_that_fell_again_and_weights_that_move_are_said(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run")
    moving = [row(step, scheduled={"objectives.similarity": 2.0 - step / 40}) for step in range(1, STEPS + 1)]
    write_rows(folder, moving)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 40, "event": "evaluation", "content": {"step": 40, "vqa": {"test": {"accuracy": 0.25}}}}\n')
    found = checks(folder)
    assert found["Evaluations"] == (LOOK, "VQA test: 25.0 % at step 40, 5.0 points under step 30")
    assert "weights of its objectives are scheduled" in found["Loss"][1]
    run = reading.read(folder)
    assert [run.weight("similarity", run.rows[step]) for step in (0, 39)] == pytest.approx([1.975, 1.0])


def test_losses_are_weighted_where_the_recipe_tells_how_and_adds_up(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run")
    assert [figure.key for figure in curves.losses(reading.read(folder))[0].figures] == ["loss", "weighted"]
    assert "similarity 1.975 at step 1" in curves.losses(reading.read(folder))[0].figures[1].alt
    edit_json(folder / "run.json", lambda run: run["recipe"]["objectives"].update(similarity=3.0))  # not what it was trained with
    assert [figure.key for figure in curves.losses(reading.read(folder))[0].figures] == ["loss"]


def test_bad_samples_are_added_over_the_starts_which_count_anew(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run")
    assert reading.read(folder).dropped == {"corrupt_image": 4}
    edit_json(folder / "run.json", lambda run: run["jobs"][1].pop("from_step"))  # as earlier versions wrote it: seen by the count
    assert reading.read(folder).dropped == {"corrupt_image": 4}
    assert cells(contents.dropped(reading.read(folder))) == [["corrupt_image", "4"]]


def test_time_is_of_each_step_and_a_row_of_several_counts_as_these(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run")
    write_rows(folder, [row(step) for step in range(5, STEPS + 1, 5)])
    [time] = [figure for figure in curves.speed(reading.read(folder)).figures if figure.key == "time"]
    assert "student 10 ms" in time.alt  # 0.05 s of 5 steps
    assert "data 2 ms" in time.alt


@pytest.mark.parametrize(
    ("ended", "verdict", "tone", "said"),
    [
        ({"how": "failed", "words": "error: no room"}, "Failed at step 30 of 40", BAD, "error: no room"),
        ({"how": "saved", "words": ""}, "Stopped by a signal at step 30 of 40", LOOK, "the same command goes on"),
        ({}, "Stopped at step 30 of 40", LOOK, "It left no word of why: it was killed"),
    ],
)  # fmt: skip
def test_a_run_that_did_not_end_says_why_and_where(ended: dict[str, str], verdict: str, tone: str, said: str, tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run")
    (folder / "model").rmdir()
    (folder / "evaluation.json").unlink()
    write_rows(folder, [row(step) for step in range(1, 31)])
    last_start(folder, **ended)
    run = reading.read(folder)
    assert health.verdict(run) == (verdict, tone)
    assert said in " ".join(health.sentences(run))
    assert health.scores(run) == (("30.0 %", "VQA test at step 30"), ("15.0 %", "retrieval test, mean R@1 at step 30"))
    assert (ended.get("how") or "under way, or no word") in cells(contents.starts(run))[-1][-1]


def test_a_run_that_hung_one_at_work_and_one_whose_evaluation_failed_are_told_apart(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run")
    last_start(folder, how="failed", words="error: evaluation.retrieval.test is gone")
    assert health.verdict(reading.read(folder)) == ("Trained to step 40 of 40, and then failed", BAD)
    last_start(folder)
    (folder / "hung").mkdir()
    (folder / "hung" / "rank_00000.txt").write_text("")
    assert health.verdict(reading.read(folder)) == ("Hung at step 40 of 40", BAD)
    holding = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holding, str(folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert health.verdict(reading.read(folder)) == ("Running at step 40 of 40", "")
        holder.communicate()


def test_a_run_without_last_words_shows_the_end_of_its_log(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run")
    (folder / "evaluation.json").unlink()
    last_start(folder)
    (tmp_path / "job.log").write_text("\n".join(f"line {number}" for number in range(5000)) + "\nslurmstepd: error: out of memory\n")
    edit_json(folder / "run.json", lambda run: run["jobs"][-1].update(log=str(tmp_path / "job.log")))
    words = health.sentences(reading.read(folder))[0].splitlines()
    assert words[-1] == "slurmstepd: error: out of memory"
    assert words[0] == "line 4995"


@pytest.mark.parametrize("damage", ["run.json", "metrics.jsonl", "evaluation.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"recipe": 3, "jobs": {}}', '{"step": 1, "loss": {}, "losses": 3}\n[]\n', "\x00\xff"])
def test_damaged_and_empty_files_make_a_page_that_says_so(damage: str, content: str, tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run")
    (folder / damage).write_bytes(content.encode("latin-1"))
    composed = compose(reading.read(folder), [], examples=True)
    assert composed.verdict
    if damage == "run.json" and content in ("", "{", "[]", "\x00\xff"):
        assert composed.verdict == "Unreadable"
        assert str(folder / "run.json") in composed.sentences[0]


def test_only_settings_that_differ_from_their_defaults_are_listed(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run")
    table, said = contents.recipe(reading.read(folder))
    assert said == ""
    listed = {setting: (value, default) for setting, value, default in cells(table)}
    assert listed["optim.warmup"] == ("4", "0")
    assert listed["optim.steps"] == ("40", "–")
    assert listed["objectives.similarity"] == ("2.0", "0.0")
    assert not {"seed", "student.max_scale", "optim.schedule"} & listed.keys()
    edit_json(folder / "run.json", lambda run: run["recipe"].update(of_another_version=True))
    table, said = contents.recipe(reading.read(folder))
    assert "of_another_version: unknown key" in said
    assert ["seed", "0", "?"] in cells(table)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything inside a value of JSON."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _places(value[key], (*path, key))


@pytest.mark.parametrize("name", ["run.json", "evaluation.json", "metrics.jsonl"])
def test_a_value_of_another_kind_anywhere_ends_in_a_page_too(name: str, tmp_path: Path) -> None:
    """Forty mutants of each file, drawn by a seed: one value in it is of another kind, or missing."""
    folder, generator = write_long_run(tmp_path / "run"), random.Random(7)
    whole = (folder / name).read_text(encoding="utf-8")
    for _ in range(40):
        lines = whole.splitlines() if name.endswith("l") else [whole]
        number = generator.randrange(len(lines))
        content = json.loads(lines[number])
        *way, last = generator.choice(list(_places(content)))
        inner = content
        for key in way:
            inner = inner[key]
        inner[last] = generator.choice([None, True, -1, 0, 3.5, 10**30, "x", "", [], {}, [1], {"a": {"b": []}}, "\ud800\n"])
        lines[number] = json.dumps(content)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        as_markdown(compose(reading.read(folder), [], examples=False)).encode()


def test_a_teachers_own_run_stands_beside_the_student_with_size_and_speed_and_its_scores_on_the_same_sets(tmp_path: Path) -> None:
    teacher = write_long_run(tmp_path / "teacher")
    edit_json(teacher / "evaluation.json", lambda found: found.update(sets="one", parameters=7000, images_per_second=50.0))
    sections = {"teacher": {"model": f"local-dir:{teacher}/model"}, "ensemble": {"second": {"model": "ViT-L-14"}}}
    run = write_long_run(tmp_path / "student", sections)

    def measured(found: dict[str, Any]) -> None:
        found.update(sets="one", parameters=900, images_per_second=400.0)
        found["models"] = {"ensemble.second": {"parameters": 304, "bytes": 2e6, "images_per_second": None}}
        found["retrieval"]["test"]["mean_R@1"] = 0.1

    edit_json(run / "evaluation.json", measured)
    table = models.table(reading.read(run))
    assert table is not None
    assert [row[:5] for row in cells(table)] == [
        ["student", "ViT-S-32", "900", "–", "400"],
        ["teacher", f"local-dir:{teacher}/model", "7,000", "–", "50"],
        ["ensemble.second", "ViT-L-14", "304", "2.0 MB", "–"],
    ]
    scores = contents.scores(reading.read(run))
    assert scores is not None
    assert [column.title for column in scores.columns][:4] == ["score", "last, %", "highest, %", "teacher, %"]
    assert {row[0]: (row[1], row[3]) for row in cells(scores)}["retrieval test, mean R@1"] == ("10.0", "30.0")

    edit_json(teacher / "evaluation.json", lambda found: found.update(sets="other"))
    table = models.table(reading.read(run))
    assert table is not None
    assert cells(table)[1][5] == "of its own run, on other sets"
    scores = contents.scores(reading.read(run))
    assert scores is not None
    assert "teacher, %" not in [column.title for column in scores.columns]


@pytest.mark.parametrize("content", ["{", "[]", '{"sets": "one", "retrieval": 3, "parameters": []}'])
def test_a_teacher_whose_evaluation_is_damaged_leaves_the_page_without_its_scores(content: str, tmp_path: Path) -> None:
    teacher = write_long_run(tmp_path / "teacher")
    (teacher / "evaluation.json").write_text(content)
    run = write_long_run(tmp_path / "student", {"teacher": {"model": f"local-dir:{teacher}/model"}})
    edit_json(run / "evaluation.json", lambda found: found.update(sets="one"))
    assert "teacher" in as_markdown(compose(reading.read(run), [], examples=False))
