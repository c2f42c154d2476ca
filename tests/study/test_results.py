"""Rows of a study and of run folders: every damage is a row with a status and a message, and nothing that is compared is mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megakd.study import found_runs
from megakd.study.results import CELL, CONTROL, DONE, FAILED, MISSING, RUNNING, TEACHER, Row, read_study
from support.study_folders import RETRIEVAL, VQA, evaluation, write_json, write_run, write_study

DAMAGE = {
    "no file": lambda path: path.unlink(),
    "no JSON": lambda path: path.write_text("{", encoding="utf-8"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "no object": lambda path: path.write_text("[1]", encoding="utf-8"),
    "too deep": lambda path: path.write_text("[" * 100_000, encoding="utf-8"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_finished_cell_whose_scores_cannot_be_read_is_a_failed_row_that_names_the_file(damage: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", lambda *_: 0.5, seeds=1)
    DAMAGE[damage](folder / "cells/1_0/evaluation.json")
    row = next(row for row in read_study(folder).rows if row.id == "cell1-0")
    assert (row.status, dict(row.scores)) == (FAILED, {})
    assert "cells/1_0/evaluation.json" in row.message


def test_numbers_that_are_none_are_no_scores(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", lambda *_: 0.5, seeds=1)
    broken = evaluation(0.4, 0.2)
    broken["vqa"]["test"]["accuracy"] = float("nan")
    broken["retrieval"] = {"test": {"mean_R@1": float("inf"), "note": "0.3", "pairs": 7, "unreadable": 1}}
    broken["hard_negatives"] = [0.1]
    write_json(folder / "cells/1_0/evaluation.json", broken)
    row = next(row for row in read_study(folder).rows if row.id == "cell1-0")
    assert row.status == DONE
    assert set(row.scores) == {"vqa/test/by_family/colour/accuracy", "vqa/test/by_family/count/accuracy"}


def test_scores_of_training_that_has_not_ended_are_left_out(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", lambda *_: 0.5, seeds=1)
    content = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    for place, (status, step) in enumerate([(RUNNING, 10), (FAILED, 20), (MISSING, 10)]):
        content["cells"][place]["status"] = status
        write_json(folder / content["cells"][place]["folder"] / "evaluation.json", evaluation(0.5, 0.2, step))
    write_json(folder / "study.json", content)
    rows = read_study(folder).rows[:3]
    # the student of the second has reached its last step: what failed came after
    assert [(row.status, VQA in row.scores) for row in rows] == [(RUNNING, False), (FAILED, True), (MISSING, False)]


def test_a_cell_has_the_scores_of_its_student_and_of_its_readout(tmp_path: Path) -> None:
    write_run(tmp_path / "a", None, 0.25)
    write_run(tmp_path / "a_vqa", 0.5, None)
    folders = {"student": "a", "readout": "a_vqa"}
    cell = {"id": "c", "folder": "a", "folders": folders, "axes": {"teacher": "T", "method": "m", "seed": 1, "steps": 20}, "status": "done"}
    lost = {**cell, "id": "d", "folders": {"student": "a", "readout": "nowhere"}}
    write_json(tmp_path / "study.json", {"format": 1, "cells": [cell, lost, "no cell", {}]})
    both, half, empty = read_study(tmp_path).rows
    assert (both.scores[VQA], both.scores[RETRIEVAL], both.steps, both.seed) == (0.5, 0.25, "20", 1)
    assert both.about == {"parameters": 1234567, "images_per_second": 789.0, "sets": "5e75"}
    assert (both.folder, both.readout) == (tmp_path / "a", tmp_path / "a_vqa")
    assert (half.status, half.scores) == (FAILED, {RETRIEVAL: 0.25, "retrieval/test/image_to_text/R@1": 0.25} | dict(half.scores))
    assert "nowhere/evaluation.json: is not there" in half.message
    assert (empty.id, empty.status, empty.method) == ("?", MISSING, None)


def test_a_teachers_score_is_its_own_or_that_of_the_readouts_of_its_tower(tmp_path: Path) -> None:
    write_run(tmp_path / "t", None, 0.3)
    for seed in (0, 1):
        write_run(tmp_path / f"v{seed}", 0.5 + seed / 10, None)
    controls = [{"name": "teacher T's tower, seed 0", "folder": "v0", "status": "done"}]
    controls += [
        {"name": "teacher T's tower", "seed": 1, "folder": "v1", "status": "done"},
        {"name": "blind decoder, seed 3", "status": "missing"},
    ]
    write_json(tmp_path / "study.json", {"format": 1, "teachers": [{"name": "T", "folder": "t", "status": "done"}], "controls": controls})
    results = read_study(tmp_path)
    assert results.teacher_scores("T", RETRIEVAL) == [0.3]
    assert results.teacher_scores("T", VQA) == [0.5, 0.6]
    assert results.teacher_scores("T", "other") == []
    assert [(row.id, row.teacher, row.seed) for row in results.of(CONTROL)] == [
        ("teacher T's tower, seed 0", "T", 0), ("teacher T's tower, seed 1", "T", 1), ("blind decoder, seed 3", None, 3),
    ]  # fmt: skip


def test_a_run_without_evaluation_sets_is_done_and_has_the_scores_of_its_readout(tmp_path: Path) -> None:
    write_run(tmp_path / "v", 0.5, None)
    cell = {"folder": "a", "axes": {"method": "m"}, "status": "done"}
    cells = [{**cell, "id": "read", "folders": {"readout": "v"}}, {**cell, "id": "unread", "folders": {}}]
    cells += [
        {"id": "nowhere", "folders": {}, "status": "done"},
        {"id": "blind", "folder": "v", "folders": {"readout": "v"}, "status": "done"},
    ]
    write_json(tmp_path / "study.json", {"format": 1, "cells": cells})
    read, unread, nowhere, blind = read_study(tmp_path).rows
    assert (read.status, read.scores[VQA], read.folder, read.readout) == (DONE, 0.5, tmp_path / "a", tmp_path / "v")
    assert (unread.status, unread.scores, unread.folder, unread.readout) == (DONE, {}, tmp_path / "a", None)
    assert (nowhere.status, nowhere.message) == (FAILED, "study.json names no folder of its run")
    assert (blind.status, blind.scores[VQA], blind.folder, blind.readout) == (DONE, 0.5, tmp_path / "v", tmp_path / "v")


def test_a_study_file_of_anything_reads_as_rows(tmp_path: Path) -> None:
    odd = [None, 3, "x", [1], {"axes": 3, "folders": 4, "folder": 5, "status": 6, "message": 7, "id": 8}]
    keys = ("cells", "teachers", "controls", "hypotheses", "scores")
    write_json(tmp_path / "study.json", {"format": 1, "axes": odd, "data": odd, "title": odd, **dict.fromkeys(keys, odd)})
    results = read_study(tmp_path)
    assert [row.kind for row in results.rows] == [CELL, TEACHER, CONTROL]
    assert {row.status for row in results.rows} == {MISSING}
    assert (results.title, results.main) == (tmp_path.name, None)


def _runs(*folders: Path) -> dict[str, Row]:
    return {row.id: row for row in found_runs.read(list(folders)).rows}


def _teaching(model: str, **objectives: float) -> dict[str, object]:
    return {"objectives": {"contrastive": 1.0, "similarity": 0.0, **objectives}, "teacher": {"model": model, "scale": None}}


def test_runs_are_told_apart_by_teacher_objectives_and_any_setting_that_differs(tmp_path: Path) -> None:
    kd, other = _teaching("ViT-H-14", similarity=1.0), _teaching("ViT-H-14", similarity=1.0)
    other["teacher"] = {"model": "ViT-H-14", "scale": "matched"}
    recipes = {
        "plain": {},
        "idle": _teaching("ViT-H-14"),  # names a teacher that no objective asks
        "kd": kd,
        "kd_again": {**kd, "log": {"every": 3}, "rkd": {"angle": 3.0}},  # rkd is off: its section says nothing
        "matched": other,
        "weighted": _teaching("ViT-H-14", similarity=2.0),
    }
    for name, recipe in recipes.items():
        write_run(tmp_path / name, None, 0.2, more=recipe)
    found = {name: (row.teacher, row.method) for name, row in _runs(tmp_path).items()}
    assert found == {
        "plain": (None, "no KD"),
        "idle": (None, "no KD"),
        "kd": ("ViT-H-14", "contrastive + similarity"),
        "kd_again": ("ViT-H-14", "contrastive + similarity"),
        "matched": ("ViT-H-14", 'contrastive + similarity, teacher.scale = "matched"'),
        "weighted": ("ViT-H-14", "contrastive + 2 similarity"),
    }
    assert found_runs.read([tmp_path]).plain == "no KD"


def test_a_run_that_another_distils_is_a_teacher_and_readouts_give_towers_their_scores(tmp_path: Path) -> None:
    write_run(tmp_path / "big", None, 0.6)
    write_run(tmp_path / "small", None, 0.4, more=_teaching("local-dir:runs/big/model", similarity=1.0))
    for name, tower in (("big_vqa0", "big"), ("big_vqa1", "big"), ("small_vqa", "small"), ("lone", "elsewhere")):
        write_run(tmp_path / name, 0.5, None, more={"answers": {"train": {}}, "student": {"model": f"local-dir:runs/{tower}/model"}})
    rows = _runs(tmp_path)
    assert {name: (row.kind, row.teacher) for name, row in rows.items()} == {
        "big, big_vqa0": (TEACHER, "big"),
        "big, big_vqa1": (TEACHER, "big"),
        "small": (CELL, "big"),
        "lone": (CELL, None),
    }
    assert (rows["small"].scores[VQA], rows["small"].scores[RETRIEVAL], rows["small"].readout) == (0.5, 0.4, tmp_path / "small_vqa")


def test_runs_of_one_name_are_told_apart_by_their_paths_and_a_study_among_runs_is_a_row(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "b/other"):
        write_run(tmp_path / name, None, 0.5)
    write_run(tmp_path / "kd", None, 0.4, more=_teaching("local-dir:elsewhere/b/run/model", similarity=1.0))
    write_json(tmp_path / "study/study.json", {"format": 1})
    rows = _runs(*(tmp_path / name for name in ("a/run", "b/run", "b/other", "kd", "study")))
    assert {name: (row.kind, row.teacher) for name, row in rows.items()} == {
        "a/run": (CELL, None), "b/run": (TEACHER, "b/run"), "other": (CELL, None), "kd": (CELL, "b/run"), "study": (CONTROL, None),
    }  # fmt: skip
    assert (rows["study"].status, "reads it alone" in rows["study"].message) == (FAILED, True)


def test_runs_that_did_not_end_are_damaged_or_none_are_rows(tmp_path: Path) -> None:
    for name in ("stopped", "broken", "unscored", "bare"):
        write_run(tmp_path / name, 0.5, 0.2)
    (tmp_path / "stopped/model").rmdir()
    (tmp_path / "stopped/evaluation.json").unlink()
    (tmp_path / "broken/run.json").write_text("{", encoding="utf-8")
    (tmp_path / "unscored/evaluation.json").unlink()
    (tmp_path / "bare/run.json").unlink()  # from elsewhere: what is there is scores alone
    (tmp_path / "empty").mkdir()
    folders = [tmp_path / name for name in ("stopped", "broken", "unscored", "bare", "empty")]
    rows = _runs(*folders)
    assert {name: row.status for name, row in rows.items()} == {
        "stopped": MISSING, "broken": FAILED, "unscored": DONE, "bare": DONE, "empty": FAILED,
    }  # fmt: skip
    assert (rows["bare"].kind, rows["bare"].scores[VQA]) == (CONTROL, 0.5)
    assert rows["stopped"].message == "it stopped at step 20 of 20"
    assert "run.json: cannot be read" in rows["broken"].message
    assert "it has no scores" in rows["unscored"].message
    assert "neither run.json nor evaluation.json" in rows["empty"].message
