"""A whole study on the tiny world: trained, killed at any moment and gone on with, and what becomes of runs that fail."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megakd.planning.cluster import Cluster
from megakd.recipe import load
from megakd.study import progress, run
from megakd.study.record import Record
from megakd.study.results import STUDY
from megakd.study.work import Job, Work
from support.runs import environment
from support.tiny_studies import CELLS, FILE, scores


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    """`megakd study` in `folder`, one run at a time."""
    command = [sys.executable, "-m", "megakd.cli", "study", "tiny.toml", "--at_once", "1", *more]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def study(folder: Path, *more: str) -> tuple[int, str]:
    process = start(folder, *more)
    said, _ = process.communicate(timeout=280)
    return process.returncode, said


def results(folder: Path) -> dict[str, Any]:
    return scores(folder / "runs/tiny")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small part of a study, which nothing has disturbed."""
    here = tmp_path_factory.mktemp("small")
    (here / "tiny.toml").write_text(FILE)
    code, said = study(here, "--small")
    assert code == 0, said
    return here


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """The study gone on with to its end."""
    here = tmp_path_factory.mktemp("whole")
    shutil.copytree(small, here, dirs_exist_ok=True)
    code, said = study(here)
    assert code == 0, said
    return here


def test_the_small_part_is_trained_from_a_store_of_its_teacher(small: Path) -> None:
    assert len(results(small)) == 2 + 1
    check_stores(small, 1)


@pytest.mark.slow
def test_a_grid_is_trained_from_one_store_of_each_teacher(whole: Path) -> None:
    """Two teachers, two methods, two seeds; what the small part has made is a part of it."""
    assert len(results(whole)) == CELLS + 2
    check_stores(whole, 2)


def check_stores(folder: Path, teachers: int) -> None:
    """That all students of a teacher have read its one store."""
    out = folder / "runs/tiny"
    assert len(list((out / "stores").iterdir())) == teachers
    for path in (out / "recipes").glob("cells_*patch*"):
        recipe = load.load_recipe(path)
        assert recipe.teacher is not None
        assert (recipe.teacher.store_miss, recipe.views.seed) == ("fail", 0)
    taught = [path for path in (out / "cells").iterdir() if "patch" in path.name]
    assert taught
    assert all("teacher's embeddings from" in (out / "logs" / f"cells_{path.name}.log").read_text() for path in taught)


def test_what_is_done_is_left_as_it_is(small: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (small / "runs/tiny").rglob("*.safetensors")}
    code, said = study(small, "--small")
    assert code == 0, said
    assert "4 of 4 runs are there already" in said
    assert {path: path.stat().st_mtime_ns for path in (small / "runs/tiny").rglob("*.safetensors")} == before


def test_the_dry_run_writes_nothing_and_tells_cells_costs_and_what_is_first(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Cluster(gpus=1, memory=16.0, kind="cpu")
    (tmp_path / "tiny.toml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    run.dry_run("tiny.toml", None, here, small=True)
    said = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]
    assert "2 cells in runs/tiny" in said
    assert "first: teachers/weak-" in said
    assert said.count(" missing ") == 2
    monkeypatch.chdir(small)
    run.dry_run("tiny.toml", None, here, small=True)
    said = capsys.readouterr().out
    assert "first:" not in said
    assert said.count(" done ") == 2


def test_watching_a_study_shows_how_far_it_is(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no study has begun here"):
        progress.watch("tiny.toml", None)
    monkeypatch.chdir(small)
    assert progress.watch("tiny.toml", None, small=True) == 0
    assert progress.watch("tiny.toml", None) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "student" in line]
    assert [[word for word in row if word.isdigit()][:4] for row in rows] == [["2", "0", "0", "0"], ["2", "0", "0", "4"]]


def test_watching_shows_the_seeds_that_the_study_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    spec, grid, work, folder = run.load("smoke_comparison", None, seeds=range(3))
    folder.mkdir(parents=True)
    Record(spec, grid, work, folder, "smoke_comparison", {}).write()
    assert progress.watch("smoke_comparison", None) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if "student" in line)
    assert [word for word in row.split() if word.isdigit()] == ["0", "0", "0", "6"]


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_with_the_same_results(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(FILE)
    moments = random.Random(7)
    for kill in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        process = start(tmp_path)
        time.sleep(moments.uniform(8, 40))
        if kill == signal.SIGKILL:
            os.killpg(process.pid, kill)
        else:
            process.send_signal(kill)
        process.communicate(timeout=120)
    code, said = study(tmp_path)
    assert code == 0, said
    assert results(tmp_path) == results(whole)


def test_a_teacher_that_cannot_be_read_is_a_row_and_the_others_go_on(small: Path, tmp_path: Path) -> None:
    for name in ("world", "runs"):
        shutil.copytree(small / name, tmp_path / name)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    tower = "architecture = { embed_dim = 64, vision_cfg = { image_size = 36, patch_size = 12, width = 64, layers = 2, head_width = 32 }, "
    tower += "text_cfg = { context_length = 32, vocab_size = 128, width = 64, heads = 2, layers = 2 } }"
    asis = f"[teachers.asis.teacher]\npretrained = '{broken}'\ntokenizer = 'data/shapes/tokenizer'\n{tower}\n\n[methods.plain]"
    (tmp_path / "tiny.toml").write_text(FILE.replace("[methods.plain]", asis) + "\n[[grid]]\nseeds = [0]\nteachers = ['weak', 'asis']\n")
    code, said = study(tmp_path)
    assert code == 1, said
    assert "broken.safetensors" in said
    rows = {tuple(row["axes"].values()): row for row in json.loads((tmp_path / "runs/tiny" / STUDY).read_text())["cells"]}
    failed = [row for axes, row in rows.items() if axes[0] == "asis"]
    assert [row["status"] for row in failed] == ["failed"]
    assert "broken.safetensors" in failed[0]["message"]
    assert all(row["status"] == "done" for axes, row in rows.items() if axes[0] != "asis")


def test_a_cell_that_diverges_is_a_row_and_is_not_tried_again(small: Path, tmp_path: Path) -> None:
    for name in ("world", "runs"):
        shutil.copytree(small / name, tmp_path / name)
    wild = "[methods.wild]\nset = { objectives = { patch = 1.0 }, optim = { lr = 1e30 } }\n\n[controls]"
    (tmp_path / "tiny.toml").write_text(FILE.replace("[controls]", wild) + '\n[[grid]]\nseeds = [0]\nteachers = ["weak"]\n')
    code, said = study(tmp_path)
    assert code == 1, said
    content = json.loads((tmp_path / "runs/tiny" / STUDY).read_text())
    (wild_cell,) = [row for row in content["cells"] if row["axes"]["method"] == "wild"]
    assert wild_cell["status"] == "failed"
    assert "not finite" in wild_cell["message"] or "NaN" in wild_cell["message"]
    note = json.loads(next((tmp_path / "runs/tiny/logs").glob("cells_*wild*.json")).read_text())
    assert note["tries"] == 1


def test_runs_that_wait_for_each_other_start_in_order(small: Path) -> None:
    _, _, work, _ = run.load(str(small / "tiny.toml"), small / "runs/tiny")
    seen: set[str] = set()
    for name, job in work.jobs.items():
        assert set(job.after) <= seen
        seen.add(name)
    assert len(seen) == 2 + 2 + CELLS


def test_what_the_longest_wait_is_for_starts_first() -> None:
    recipe, _ = load.load("smoke", ["optim.steps=10", "optim.warmup=0", "optim.batch=8"])
    longer, _ = load.load("smoke", ["optim.steps=100", "optim.batch=8"])
    work = Work()
    work.add(Job("teachers/short", "teacher", recipe))
    work.add(Job("teachers/long", "teacher", longer))
    work.add(Job("stores/long", "store", longer, ("teachers/long",)))
    work.add(Job("cells/of_short", "student", recipe, ("teachers/short",)))
    work.add(Job("cells/of_long", "student", recipe, ("stores/long",)))
    work.add(Job("controls/blind", "readout", recipe))
    assert work.longest_chains() == {
        "teachers/short": 160, "teachers/long": 880, "stores/long": 80, "cells/of_short": 80, "cells/of_long": 80, "controls/blind": 80
    }  # fmt: skip


def test_a_full_disk_is_no_end_of_the_study(small: Path, tmp_path: Path) -> None:
    """Files of a study are on a file system of 8 MB, which the first runs fill; what follows fails, and the study tells."""
    room = tmp_path / "room"
    room.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", room], check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        shutil.copytree(small / "world", tmp_path / "world")
        (tmp_path / "tiny.toml").write_text(FILE)
        code, said = study(tmp_path, "--small", "--out", str(room))
    finally:
        subprocess.run(["umount", "-l", room], check=True)
    assert code == 1, said
    assert "No space left on device" in said or "disk" in said
    assert "Traceback" not in said
    assert "megakd study tiny.toml` tries again" in said
