"""What an earlier commit wrote is read: a run folder, a checkpoint, a store of teacher embeddings, a decoder's bundle."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from support.golden import ALONE, QUESTIONS, STORE, WRITTEN, ask, differences, golden, inside, machine, measured, megakd, run, scores
from support.runs import settings, train

HALF = "checkpoints/step_00000006"


def _steps(content: dict[str, Any], first: int) -> dict[str, Any]:
    """The golden numbers from a step on."""
    return {**content, "curve": {name: values[first - 1 :] for name, values in content["curve"].items()}}


def _exact(expected: dict[str, Any]) -> bool:
    """Whether this machine has written both the golden numbers and the files."""
    written = json.loads((WRITTEN / "machine.json").read_text(encoding="utf-8"))
    return bool(machine() == expected["machine"] == written)


def test_a_stopped_run_goes_on_as_if_nothing_had_been(workplace: Path) -> None:
    expected = golden("one_rank")
    shutil.copytree(WRITTEN / "smoke", workplace / "out" / "resumed")
    resumed = run("one_rank", workplace, "out/resumed")
    assert differences(expected, measured(resumed), exact=_exact(expected)) == []
    # times and memory of the first six steps included: these were not run again
    earlier = (WRITTEN / "smoke" / "metrics.jsonl").read_text(encoding="utf-8")
    assert (resumed / "metrics.jsonl").read_text(encoding="utf-8").startswith(earlier)
    assert len(json.loads((resumed / "run.json").read_text(encoding="utf-8"))["jobs"]) == 2


def test_a_checkpoint_alone_is_gone_on_with_in_another_folder(workplace: Path) -> None:
    expected = golden("one_rank")
    with inside(workplace):
        finished = train("smoke", "--out", "out/from_checkpoint", "--resume", f"runs/smoke/{HALF}", sets=ALONE)
    assert finished.code == 0, finished.err
    assert differences(_steps(expected, 7), measured(workplace / "out" / "from_checkpoint"), exact=_exact(expected)) == []


def test_a_run_json_is_a_recipe_and_its_run_is_listed(workplace: Path) -> None:
    with inside(workplace):
        finished = train("runs/smoke_teacher/run.json", "--out", "out/replayed", "--dry_run")
        listed = megakd("jobs", "runs")
    assert finished.code == 0, finished.err
    assert "dry run: all of this is sound" in finished.out
    assert all(name in listed for name in ("smoke_teacher", "smoke", "200", "6/12"))


def test_a_finished_run_is_evaluated_as_it_was(workplace: Path) -> None:
    expected = golden("reading")
    (workplace / "runs" / "smoke_teacher" / "evaluation.json").unlink()
    with inside(workplace):
        megakd("evaluate", "runs/smoke_teacher")
    found = {"curve": {}, "scores": scores(workplace / "runs" / "smoke_teacher")}
    assert differences({"curve": {}, "scores": expected["scores"]}, found, exact=expected["machine"] == machine()) == []


def test_training_from_a_store_has_the_losses_of_the_live_teacher(workplace: Path) -> None:
    found = measured(run("one_rank", workplace, "out/stored", *STORE))
    assert differences(golden("one_rank"), found, exact=False) == []


def test_a_stores_embeddings_are_those_of_the_live_teacher(workplace: Path) -> None:
    with inside(workplace):
        said = megakd("embed", "--recipe", "smoke", "--out", "runs/store", "--dtype", "fp32", "--check", *settings(*ALONE))
    assert "240" in said


def test_a_bundle_gives_the_answers_that_it_gave(workplace: Path) -> None:
    with inside(workplace):
        answers = {question: ask(question) for question in QUESTIONS}
    assert answers == golden("reading")["answers"]


def test_what_is_committed_is_small_and_nothing_of_it_is_a_pickle_or_names_a_machine() -> None:
    files = [path for path in WRITTEN.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".md", ""}
    assert sum(path.stat().st_size for path in files) < 1_000_000
    for path in files:
        assert re.search(rb'"/\w+/', path.read_bytes()) is None, f"{path} names an absolute path"
