"""A study's file: what of it makes cells, what they are called, and one message for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megakd.recipe import load
from megakd.study import run, spec
from megakd.study.grid import Grid, expand

TINY = """
title = "tiny"
base = "smoke"
seeds = [0, 1]

[teachers.weak]
recipe = "smoke_teacher"
set = { "optim.steps" = 60 }

[teachers.strong]
recipe = "smoke_teacher"

[students.same]

[students.narrow.set.student.architecture]
embed_dim = 32

[methods.plain]
teacher = false

[methods.similarity]
set = { "objectives.similarity" = 1.0 }

[[scores]]
name = "R@1"
path = "retrieval/test/mean_R@1"
"""


def written(folder: Path, text: str = TINY) -> str:
    """The study's file."""
    path = folder / "tiny.toml"
    path.write_text(text)
    return str(path)


def grid_of(folder: Path, text: str = TINY) -> Grid:
    return expand(spec.read(written(folder, text))[0], folder / "out")


def ids(grid: Grid) -> dict[str, str]:
    return {str(cell): cell.id for cell in grid.cells}


def test_a_student_without_a_teacher_is_one_cell_for_all_of_them(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    assert [str(cell) for cell in grid.cells if cell.axes["seed"] == 0] == [
        "same / plain / seed 0",
        "weak / same / similarity / seed 0",
        "narrow / plain / seed 0",
        "weak / narrow / similarity / seed 0",
        "strong / same / similarity / seed 0",
        "strong / narrow / similarity / seed 0",
    ]
    assert len(grid.cells) == 12
    assert grid.cells[0].folder == f"cells/same_plain_seed_0-{grid.cells[0].id}"


def test_a_method_names_all_objectives_that_it_learns_with(tmp_path: Path) -> None:
    for cell in grid_of(tmp_path).cells:
        assert list(cell.recipe.active()) == ["contrastive", *(["similarity"] if cell.teacher else [])]
        assert cell.recipe.student is not None
        assert (cell.recipe.student.architecture or {})["embed_dim"] == (32 if cell.axes["student"] == "narrow" else 64)


def test_ids_follow_content_and_not_the_order_of_the_file(tmp_path: Path) -> None:
    before = ids(grid_of(tmp_path))
    blocks = TINY.split("\n\n")
    turned = "\n\n".join([blocks[0], *reversed(blocks[1:-1]), blocks[-1]]).replace("seeds = [0, 1]", "seeds = [1, 0]")
    assert ids(grid_of(tmp_path, turned)) == before
    assert ids(expand(spec.read(written(tmp_path))[0], tmp_path / "elsewhere")) == before
    stronger = ids(grid_of(tmp_path, TINY.replace('"optim.steps" = 60', '"optim.steps" = 61')))
    assert {name for name in before if before[name] != stronger[name]} == {name for name in before if name.startswith("weak")}
    hotter = ids(grid_of(tmp_path, TINY.replace('base = "smoke"', 'base = "smoke"\nset = { "optim.lr" = 0.001 }')))
    assert not set(before.values()) & set(hotter.values())
    scored = 'base = "smoke"\nevaluation = { retrieval = { more = "data/shapes/test/*.tar" } }\nset = { data = { workers = 0 } }'
    assert ids(grid_of(tmp_path, TINY.replace('base = "smoke"', scored))) == before  # the same students, scored on more


def test_parts_of_the_grid_and_what_is_left_out(tmp_path: Path) -> None:
    parts = """
[[grid]]
students = ["same"]

[[grid]]
seeds = [1]
teachers = ["strong"]

[[exclude]]
students = ["narrow"]
methods = ["plain"]
"""
    cells = {str(cell) for cell in grid_of(tmp_path, TINY + parts).cells}
    assert cells == {
        "same / plain / seed 0",
        "same / plain / seed 1",
        *(f"{teacher} / same / similarity / seed {seed}" for teacher in ("weak", "strong") for seed in (0, 1)),
        "strong / narrow / similarity / seed 1",
    }


def test_numbers_of_steps_are_short_for_their_overrides(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, TINY.replace("seeds = [0, 1]", "seeds = [0]\nsteps = [100, 300]"))
    assert {(cell.axes["steps"], cell.recipe.optim.steps) for cell in grid.cells} == {("100", 100), ("300", 300)}


@pytest.mark.parametrize(
    "value",
    [3, 2.5e-4, True, 'a "quoted" \\ text\nwith a line\tand ünïcode', [1, "two"], ["{a,b}.tar"], {}, {"a b": [{"c": 1}]}, [{"x": "y"}]],
)
def test_a_value_of_a_file_is_what_an_override_sets(value: Any) -> None:
    recipe = load.load_recipe("smoke", spec.as_overrides({"student": {"architecture": {"extra": value}}}))
    assert recipe.student is not None
    assert recipe.student.architecture is not None
    assert recipe.student.architecture["extra"] == value


ONE_SCORE = "[[scores]]"
# What stands in the file, what is written in its place, and what is said of it.
COMPARED = """[[hypotheses]]
name = "h"
prediction = "p"
measure = "order_difference"
method = "similarity"
against = "similarity"
threshold = 0.0
"""
MISTAKES: dict[str, tuple[str, str, list[str]]] = {
    "an axis without values": ("seeds = [0, 1]", "seeds = []", ["seeds", "at least 1 item"]),
    "no methods": (TINY[TINY.index("[methods.plain]") : TINY.index(ONE_SCORE)], "[methods]\n", ["methods", "at least 1 item"]),
    "no teachers": (
        TINY[TINY.index("[teachers.weak]") : TINY.index("[students.same]")],
        "",
        ["teachers: an axis without values", "methods.similarity needs a teacher"],
    ),
    "two names for one content": (
        "[students.same]",
        "[students.same]\n\n[students.again]",
        ["student: 'same' and 'again' are two names of one content"],
    ),
    "an override that no recipe takes": (
        "objectives.similarity",
        "objectives.similarty",
        ["methods.similarity", "objectives.similarty: unknown key; did you mean 'objectives.similarity'?"],
    ),
    "of a teacher's recipe": ("optim.steps", "optim.stepz", ["teachers.weak", "optim.stepz: unknown key"]),
    "a score no cell has": (
        "retrieval/test/mean_R@1",
        "vqa/test/accuracy",
        ["scores[0].path = 'vqa/test/accuracy'", "the readout's recipes name no vqa set"],
    ),
    "a set no cell has": ("retrieval/test/", "retrieval/tset/", ["no set is called 'tset'; did you mean 'test'?"]),
    "an unknown key": ('title = "tiny"', 'title = "tiny"\nsteeps = [1]', ["steeps: unknown key; did you mean 'steps'?"]),
    "a missing key": ('base = "smoke"\n', "", ["base: missing"]),
    "an unknown recipe": ('base = "smoke"', 'base = "smok"', ["not a shipped recipe; did you mean 'smoke'?"]),
    "a seed twice": ("seeds = [0, 1]", "seeds = [0, 0]", ["name each seed once"]),
    "steps twice": ("seeds = [0, 1]", "steps = [5, 5]", ["name each number of steps once"]),
    "an unknown name in a part": (
        ONE_SCORE,
        f'[[exclude]]\nteachers = ["wek"]\n\n{ONE_SCORE}',
        ["exclude[0]: no teacher is called 'wek'; did you mean 'weak'?"],
    ),
    "nothing left": (ONE_SCORE, f"[[exclude]]\n\n{ONE_SCORE}", ["nothing of the grid is left"]),
    "a method without an objective": (
        'set = { "objectives.similarity" = 1.0 }',
        "",
        ["methods.similarity: no objective of it reads a teacher"],
    ),
    "a plain method with one": (
        "teacher = false",
        'teacher = false\nset = { "objectives.feature" = 1.0 }',
        ["methods.plain: teacher = false, and objectives.feature needs one"],
    ),
    "a teacher that is none": (
        '[teachers.strong]\nrecipe = "smoke_teacher"',
        "[teachers.strong]",
        ["teachers.strong: give either `recipe`"],
    ),
    "no TOML": ("seeds = [0, 1]", "seeds = [0, 1", ["not valid TOML"]),
    "a hypothesis about nothing": (
        ONE_SCORE,
        f'[[hypotheses]]\nname = "h"\nprediction = "p"\nmeasure = "order"\nmethod = "similar"\nthreshold = 0.5\n\n{ONE_SCORE}',
        ["hypotheses[0].method = 'similar': did you mean 'similarity'?"],
    ),
    "a hypothesis that compares cells with themselves": (
        ONE_SCORE,
        f"{COMPARED}only = {{ teachers = ['weak'] }}\nagainst_only = {{}}\n\n{ONE_SCORE}",
        ["hypotheses[0]: of each teacher and seed that both have, `method` and `against` are the same cells"],
    ),
    "one whose sides share no teacher": (
        ONE_SCORE,
        f"{COMPARED}only = {{ teachers = ['weak'] }}\nagainst_only = {{ teachers = ['strong'] }}\n\n{ONE_SCORE}",
        ["hypotheses[0]: `method` and `against` have no cells of one teacher and seed"],
    ),
    "one without cells": (
        ONE_SCORE,
        f"[[exclude]]\nstudents = ['narrow']\n\n{COMPARED}only = {{ students = ['narrow'] }}\n\n{ONE_SCORE}",
        ["hypotheses[0].method: the grid has no cells of 'similarity' there"],
    ),
}


@pytest.mark.parametrize(("old", "new", "said"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_message_before_anything_runs(tmp_path: Path, old: str, new: str, said: list[str]) -> None:
    assert old in TINY
    with pytest.raises(ValueError, match="study ") as caught:
        run.load(written(tmp_path, TINY.replace(old, new)), tmp_path / "out")
    assert all(words in str(caught.value) for words in said), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_study_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        spec.read(str(tmp_path / "none.toml"))
    with pytest.raises(ValueError, match="not a shipped study"):
        spec.read("nothing")


def has_small_part(name: str) -> bool:
    """The smoke jobs are small as they are."""
    return not name.startswith("smoke_")


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", spec.shipped())
def test_a_shipped_study_is_sound_and_has_a_small_part(name: str, small: bool, tmp_path: Path) -> None:
    if small and not has_small_part(name):
        with pytest.raises(ValueError, match="--small: this study has no"):
            run.load(name, tmp_path / "out", small=True)
        return
    written_down, grid, work, folder = run.load(name, tmp_path / "out", small=small)
    assert folder == tmp_path / "out"
    assert work.jobs
    assert len({cell.folder for cell in grid.cells}) == len(grid.cells)
    assert written_down.scores[0].name == {"smoke_comparison": "zero-shot", "ingredients": "mean R@1"}.get(name, "VQA")
    kept = {cell.id for cell in grid.cells}
    assert kept <= {cell.id for cell in run.load(name, tmp_path / "out")[1].cells}


def test_no_shipped_study_has_a_shipped_recipes_name() -> None:
    assert not set(spec.shipped()) & set(load.shipped())


def test_teachers_may_teach_each_other_in_the_order_of_the_file(tmp_path: Path) -> None:
    taught = '[teachers.helper]\nrecipe = "smoke"\ntaught_by = "strong"\n\n[students.same]'
    _, grid, work, out = run.load(written(tmp_path, TINY.replace("[students.same]", taught)), tmp_path / "out")
    helper, strong = grid.teachers["helper"], grid.teachers["strong"]
    assert work.jobs[helper.folder].after == (strong.folder,)
    assert helper.recipe is not None
    assert helper.recipe.teacher is not None
    assert helper.recipe.teacher.model == f"local-dir:{out / strong.folder}/model"
    early = TINY.replace('[teachers.weak]\nrecipe = "smoke_teacher"', '[teachers.weak]\nrecipe = "smoke"\ntaught_by = "strong"')
    with pytest.raises(ValueError, match=r"teachers.weak.taught_by = 'strong': no teacher before it in the file is called so"):
        run.load(written(tmp_path, early), None)


@pytest.mark.parametrize("name", spec.shipped())
def test_runs_are_called_alike_wherever_the_study_lies(name: str, tmp_path: Path) -> None:
    _, _, here, _ = run.load(name, Path("runs/here"), small=has_small_part(name))
    _, _, there, _ = run.load(name, tmp_path / "there", small=has_small_part(name))
    assert list(here.jobs) == list(there.jobs)


LIVE = {
    "patches without a grid": ("objectives = { patch = 1.0 }", "reads patch tokens, which a store holds with teacher.patch_grid alone"),
    "a tower's attention": ('objectives = { attention = 1.0 }, attention = { map = "weights" }', "reads a tower's own attention"),
}


@pytest.mark.parametrize(("settings", "said"), LIVE.values(), ids=list(LIVE))
def test_what_a_store_does_not_hold_runs_in_every_step_and_is_said(settings: str, said: str, tmp_path: Path) -> None:
    method = f"[methods.dense]\nset = {{ {settings} }}\n\n[students.same]"
    _, grid, work, _ = run.load(written(tmp_path, TINY.replace("[students.same]", method)), tmp_path / "out")
    assert len(work.said) == 1
    assert work.said[0].startswith(f"methods.dense: {said}")
    for cell in grid.cells:
        teacher = work.jobs[work.cells[cell.id][0]].recipe.teacher
        assert teacher is not None
        assert (teacher.store is None) == (cell.axes["method"] != "similarity")


READ = """
evaluation = { zero_shot = {}, retrieval = {}, hard_negatives = {} }

[readout]
chain = ["smoke_decoder", "vqa_align", "vqa_lora"]

[teachers.asis]
teacher = { model = "ViT-B-32" }

[teachers.weak]"""


@pytest.mark.parametrize("every", [False, True])
def test_towers_that_are_only_read_are_not_scored_by_themselves(every: bool, tmp_path: Path) -> None:
    """Neither the random ones nor a teacher as it is; the teachers' are read with one seed, or with every one."""
    text = TINY.replace("retrieval/test/mean_R@1", "vqa/test/accuracy").replace("\n[teachers.weak]", READ, 1)
    text = text.replace("[readout]", f"[readout]\nevery_seed = {str(every).lower()}")
    _, _, work, _ = run.load(written(tmp_path, text), tmp_path / "out")
    assert {job.kind for job in work.jobs.values()} == {"teacher", "store", "student", "readout"}
    for name, (own, read) in work.teachers.items():
        assert (own is None) == (name == "asis")
        assert (read is None) == every
        rows = [of for row, of in work.controls.items() if row.startswith(f"teacher {name}'s tower, seed ")]
        assert len(rows) == (2 if every else 0)
        assert {work.jobs[str(of[1])].recipe.seed for of in rows} == ({0, 1} if every else set())


def test_a_store_holds_the_blocks_of_all_methods_that_read_it(tmp_path: Path) -> None:
    dense = "[methods.dense]\nset = { objectives = { patch = 1.0 }, patch = { blocks = [-1] } }\n\n"
    dense += "[methods.relation]\nset = { objectives = { patch_relation = 1.0 } }\n\n[students.same]"
    grids = TINY.replace('recipe = "smoke_teacher"', 'recipe = "smoke_teacher"\nteacher = { patch_grid = [3, 3] }')
    _, _, work, _ = run.load(written(tmp_path, grids.replace("[students.same]", dense)), tmp_path / "out")
    stores = [job for job in work.jobs.values() if job.kind == "store"]
    assert len(stores) == 2
    assert all(sorted(job.recipe.teacher_blocks()) == [-2, -1] for job in stores)


@pytest.mark.parametrize(("code", "state"), [(85, "missing"), (1, "failed"), (2, "failed"), (86, "failed"), (0, "missing")])
def test_a_run_that_a_signal_ended_is_to_come_and_no_failure(code: int, state: str, tmp_path: Path) -> None:
    _, _, work, out = run.load(written(tmp_path), tmp_path / "out")
    job = next(iter(work.jobs.values()))
    job.note(out).parent.mkdir(parents=True)
    job.note(out).write_text(f'{{"code": {code}, "message": "why", "seconds": 1.0, "tries": 1}}')
    assert job.state(out) == (state, "why" if state == "failed" else "")
