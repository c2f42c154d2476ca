"""`megakd smoke` and `smoke --vqa`: shipped studies, whose recipes stay what they were; the whole jobs take minutes, so behind
`make test-slow`.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megakd.recipe import Recipe, load, resume, texts
from megakd.study import launcher, run, spec
from megakd.study.work import Work

SEEDS = (0, 1)


class Earlier(NamedTuple):
    """A run as it was before the smoke jobs were studies, and as README's numbers are of: a shipped recipe, overrides of it, and the runs
    whose results it reads.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


NO_KD = "objectives.similarity=0.0"
NO_SETS = ("evaluation.zero_shot={}", "evaluation.retrieval={}", "evaluation.hard_negatives={}")
TEACHER, DECODER = "teachers/smoke_teacher", "readouts/smoke_decoder"
# By name and seed.
COMPARISON = {(TEACHER, 0): Earlier("smoke_teacher")}
QUESTIONS = {(TEACHER, 0): Earlier("smoke_teacher", ("optim.steps=280", *NO_SETS)), (DECODER, 0): Earlier("smoke_decoder")}
for seed in SEEDS:
    name, half = f"seed={seed}", ("optim.steps=180", *NO_SETS)
    without, taught = f"cells/no_KD_seed_{seed}", f"cells/smoke_teacher_KD_seed_{seed}"
    COMPARISON[without, seed] = Earlier("smoke", (name, NO_KD))
    COMPARISON[taught, seed] = Earlier("smoke", (name,), (TEACHER,))
    QUESTIONS[without, seed] = Earlier("smoke", (name, NO_KD, *half))
    QUESTIONS[taught, seed] = Earlier("smoke", (name, *half), (TEACHER,))
    QUESTIONS["readouts/blind", seed] = Earlier("vqa_blind", (name,), (DECODER,))
    for tower in (without, taught, TEACHER, f"controls/random_default_{seed}"):
        start = f"readouts/{tower.partition('/')[2]}"
        own = ("student.pretrained=random",) if "random" in tower else ()
        made = () if own else (tower,)
        QUESTIONS[f"{start}-vqa_align", seed] = Earlier("vqa_align", (name, *own), (*made, DECODER))
        QUESTIONS[f"{start}-vqa_lora", seed] = Earlier("vqa_lora", (name, *own), (*made, DECODER, f"{start}-vqa_align"))


def learned(recipe: Recipe) -> dict[str, Any]:
    """All that changes what is learned, but where models lie, and all that it is scored on."""
    settings = texts.flat(recipe.model_dump(mode="json", exclude_none=True, exclude={"evaluation"}))
    places = ("teacher.model", "student.model", "decoder.model", "decoder.start")
    kept = {key: value for key, value in settings.items() if resume.change(key) != "free" and key not in places}
    return {**kept, "evaluation": recipe.evaluation.model_dump(mode="json")}


def without_id(name: str) -> str:
    return re.sub(r"-[0-9a-f]{10}(?=-|$)", "", name)


def check(work: Work, earlier: dict[tuple[str, int], Earlier], data: str) -> None:
    jobs = {(without_id(name), job.recipe.seed): job for name, job in work.jobs.items()}
    assert jobs.keys() == earlier.keys()
    assert len(jobs) == len(work.jobs)
    for key, (recipe, overrides, after) in earlier.items():
        job, expected = jobs[key], learned(load.load_recipe(recipe, [*launcher.moved(recipe, Path(data)), *overrides]))
        found = learned(job.recipe)
        if "random" in key[0]:  # of the teacher's architecture, which had been read from the teacher's folder
            architecture = {name: found.pop(name) for name in list(found) if name.startswith("student.architecture.")}
            assert architecture.items() <= learned(load.load_recipe("smoke_teacher")).items()
            assert architecture
        assert found == expected, key
        assert tuple(map(without_id, job.after)) == after, key


def test_every_run_of_the_comparison_is_what_it_always_was(tmp_path: Path) -> None:
    written, _, work, out = run.load("smoke_comparison", tmp_path, seeds=range(2))
    check(work, COMPARISON, "data/shapes")
    assert written.world == spec.World(folder="data/shapes", train=20000, test=2000, seed=0, caption_noise=0.5)
    for name, job in work.jobs.items():
        if "_KD" in name and "no_KD" not in name:
            assert job.recipe.teacher is not None
            assert job.recipe.teacher.model == f"local-dir:{out}/{job.after[0]}/model"
            assert (job.recipe.teacher.store, job.recipe.views.seed) == (None, None)


def test_every_run_of_the_questions_is_what_it_always_was(tmp_path: Path) -> None:
    written, _, work, _ = run.load("smoke_vqa", tmp_path, seeds=range(2))
    check(work, QUESTIONS, "data/shapes_vqa")
    assert written.world == spec.World(folder="data/shapes_vqa", train=12000, test=1000, seed=0, caption_noise=0.5)
    assert list(work.controls) == [
        *(f"teacher smoke_teacher's tower, seed {seed}" for seed in SEEDS),
        *(f"random tower, seed {seed}" for seed in SEEDS),
        *(f"blind decoder, seed {seed}" for seed in SEEDS),
    ]


@pytest.mark.parametrize("study", ["smoke_comparison", "smoke_vqa"])
def test_seeds_and_the_folder_of_data_are_the_commands(study: str, tmp_path: Path) -> None:
    data = tmp_path / "a world"
    written, grid, work, _ = run.load(study, tmp_path / "out", seeds=range(3), data=data)
    assert written.seeds == [0, 1, 2]
    assert written.world is not None
    assert written.world.folder == str(data)
    one, _ = spec.read(study)
    assert (one.seeds, len(grid.cells)) == ([0], 6)
    for job in work.jobs.values():
        text = json.dumps(job.recipe.model_dump(mode="json"))
        assert f"{data}/" in text
        assert "data/shapes" not in text


def test_a_folder_of_data_needs_a_world_in_the_study(tmp_path: Path) -> None:
    path = tmp_path / "bare.toml"
    path.write_text(
        'title = "bare"\nbase = "smoke"\n\n[methods.plain]\nteacher = false\n\n[[scores]]\nname = "R"\npath = "retrieval/test/mean_R@1"'
    )
    assert spec.read(str(path), seeds=range(2))[0].seeds == [0, 1]
    with pytest.raises(ValueError, match=r"bare.toml: has no \[world\]"):
        spec.read(str(path), data=tmp_path)


def test_runs_of_the_earlier_layout_are_left_alone(tmp_path: Path) -> None:
    """OUT/teacher, OUT/kd_seed0, OUT/recipes/*.json and OUT/table.json, as smoke jobs wrote them before they were studies."""
    for name in ("teacher", "kd_seed0"):
        (tmp_path / name / "model").mkdir(parents=True)
    for name in ("recipes/teacher.json", "table.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for study in ("smoke_comparison", "smoke_vqa"):
        _, _, work, out = run.load(study, tmp_path)
        assert {job.state(out)[0] for job in work.jobs.values()} == {"missing"}
        assert not {job.recipe_file(out).name for job in work.jobs.values()} & {"teacher.json"}


def test_every_file_of_a_shipped_recipe_is_taken_from_another_data_folder(tmp_path: Path) -> None:
    data = tmp_path / "a world"
    for name in load.shipped():
        before = json.dumps(load.load_recipe(name).model_dump(mode="json"))
        after = load.load_recipe(name, launcher.moved(name, data)).model_dump(mode="json")
        assert after == json.loads(before.replace('"data/shapes/', f'"{data}/')), name
    assert launcher.moved("smoke", Path("data/shapes")) == []


def smoke(folder: Path, *more: str) -> tuple[str, list[dict[str, str]]]:
    """What `megakd smoke` prints, and the rows of its results.csv."""
    command = [str(Path(sys.executable).with_name("megakd")), "smoke", "--out", "runs", "--data", "data", *more]
    said = subprocess.run(command, check=True, cwd=folder, capture_output=True, text=True).stdout
    with (folder / "runs" / "results.csv").open(encoding="utf-8", newline="") as file:
        return said, list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_smoke_table_shows_the_student_with_kd_ahead(tmp_path: Path) -> None:
    said, rows = smoke(tmp_path)
    zero_shot, mean = "zero_shot/seen/top1", "retrieval/test/mean_R@1"
    scores = {row["method"] or row["id"]: (float(row[zero_shot]), float(row[mean])) for row in rows}
    assert scores["teacher smoke_teacher"][0] > 0.5
    assert all(with_kd > without + 0.1 for with_kd, without in zip(scores["KD"], scores["no KD"], strict=True))
    gain = 100 * (scores["KD"][0] - scores["no KD"][0])
    assert f"KD over no KD, zero-shot top-1: +{gain:.1f} points" in said
    assert "training images/s" in said
    assert "runs/report.html" in said
    again, same = smoke(tmp_path)
    assert "there already" in again
    assert "3 of 3 runs are there already" in again
    assert same == rows


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_vqa_table_orders_the_vision_towers(tmp_path: Path) -> None:
    said, rows = smoke(tmp_path, "--vqa")
    overall = {row["method"] or row["id"]: float(row["vqa/test/accuracy"]) for row in rows}
    assert overall["random tower, seed 0"] > overall["blind decoder, seed 0"] + 0.01
    for trained in ("KD", "teacher smoke_teacher"):
        assert overall[trained] > overall["random tower, seed 0"] + 0.02, trained
    families = said[said.index("VQA by kind of question") :]
    assert all(name in families for name in ("colour", "relation", "teacher smoke_teacher", "random tower", "blind decoder"))
    assert "VQA, held-out pairs" in said
