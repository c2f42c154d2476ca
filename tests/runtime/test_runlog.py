"""A run folder's files: what is dropped at a resume, what belongs to whom, and what a crash may leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megakd.recipe import load as recipes
from megakd.runtime import environment, run_folder
from megakd.runtime.run_folder import RunLog


def _metrics(run: Path, text: str) -> None:
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")


def _run_json(run: Path, recipe_file: Path, *overrides: str) -> None:
    recipe = recipes.load(str(recipe_file), overrides)[0]
    run_folder.write_json(run / "run.json", {"recipe": recipe.model_dump(mode="json")})


def test_rows_past_the_checkpoint_are_dropped_and_those_before_stay(tmp_path: Path) -> None:
    _metrics(tmp_path, "".join(json.dumps({"step": step, "loss": 0.1}) + "\n" for step in (1, 2, 3, 4)))
    RunLog(tmp_path, main=True).keep_until(2)
    assert [row["step"] for row in run_folder.read_metrics(tmp_path)] == [1, 2]


def test_a_last_line_cut_by_a_crash_is_left_out_and_cleared(tmp_path: Path) -> None:
    _metrics(tmp_path, '{"step": 1, "loss": 0.1}\n{"step": 2, "lo')
    assert [row["step"] for row in run_folder.read_metrics(tmp_path)] == [1]
    log = RunLog(tmp_path, main=True)
    log.keep_until(5)
    log.event(2, "evaluation", {"x": 1})
    assert [row["step"] for row in run_folder.read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("line", ["garbage", "[1]", "{}", '{"step": "2"}', "[" * 10**5, "\x00\x00"])
def test_a_line_that_is_no_row_is_dropped_and_said(tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    _metrics(tmp_path, f'{{"step": 1, "loss": 0.1}}\n{line}\n{{"step": 3, "loss": 0.1}}\n')
    assert [row["step"] for row in run_folder.read_metrics(tmp_path)] == [1, 3]
    RunLog(tmp_path, main=True).keep_until(3)
    assert "metrics.jsonl: 1 damaged lines were dropped" in capsys.readouterr().out.replace("\n", "")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_bytes_that_are_no_text_are_a_damaged_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    assert [row["step"] for row in run_folder.read_metrics(tmp_path)] == [1, 2]


def test_a_number_that_json_does_not_have_is_written_as_null(tmp_path: Path) -> None:
    RunLog(tmp_path, main=True).event(1, "x", {"norm": float("nan"), "all": [float("inf"), 1.0]})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["content"] == {"norm": None, "all": [None, 1.0]}


def test_the_other_ranks_write_nothing(tmp_path: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, main=False)
    log.open(recipes.load(str(recipe_file))[0], {}, 2)
    log.event(1, "evaluation", {})
    log.say("something")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_run_json_replays_the_recipe_and_says_what_ran(tmp_path: Path, recipe_file: Path) -> None:
    recipe = recipes.load(str(recipe_file))[0]
    RunLog(tmp_path, main=True).open(recipe, {"train_batch_size": 16}, 2)
    content = json.loads((tmp_path / "run.json").read_text())
    assert recipes.load(str(tmp_path / "run.json"))[0] == recipe
    assert content["ds_config"] == {"train_batch_size": 16}
    assert content["ranks"] == 2
    assert content["versions"]["torch"]
    assert content["versions"]["deepspeed"]
    assert content["argv"]


def test_run_json_keeps_every_start_and_the_newest_job_first(tmp_path: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.load(str(recipe_file))[0]
    monkeypatch.setenv("MEGAKD_LOG", "/logs/4711.log")
    for restart, ranks, step in (("0", 2, 0), ("1", 4, 40)):
        for name, value in {"JOB_ID": "4711", "JOB_NODELIST": "gpu[1-2]", "RESTART_COUNT": restart}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        RunLog(tmp_path, main=True).open(recipe, {}, ranks, step)
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["slurm_job_id"] == "4711"
    shared = {"slurm_job_id": "4711", "nodes": "gpu[1-2]", "log": "/logs/4711.log"}
    starts = [{key: value for key, value in job.items() if key != "started"} for job in content["jobs"]]
    assert starts == [{**shared, "restarts": 0, "ranks": 2, "from_step": 0}, {**shared, "restarts": 1, "ranks": 4, "from_step": 40}]
    assert content["jobs"][-1]["started"] == content["started"]
    assert recipes.load(str(tmp_path / "run.json"))[0] == recipe


def test_run_json_says_how_each_start_ended_and_only_of_a_start_that_began(tmp_path: Path, recipe_file: Path) -> None:
    recipe = recipes.load(str(recipe_file))[0]
    first, second = RunLog(tmp_path, main=True), RunLog(tmp_path, main=True)
    first.open(recipe, {}, 1)
    first.ended(run_folder.FAILED, "error: https://user:secret@host/x is gone")
    second.ended(run_folder.FINISHED)  # refused before it wrote anything
    second.open(recipe, {}, 1, 3)
    second.ended(run_folder.SAVED)
    starts = json.loads((tmp_path / "run.json").read_text())["jobs"]
    assert [(start["from_step"], start["ended"]["how"]) for start in starts] == [(0, "failed"), (3, "saved")]
    assert "secret" not in starts[0]["ended"]["words"]
    assert "is gone" in starts[0]["ended"]["words"]
    (tmp_path / "run.json").unlink()
    second.ended(run_folder.FINISHED)  # the folder was emptied: nothing is put there
    assert list(tmp_path.iterdir()) == []


def test_the_run_json_of_an_earlier_version_is_gone_on_with(tmp_path: Path, recipe_file: Path) -> None:
    _run_json(tmp_path, recipe_file)
    RunLog(tmp_path, main=True).open(recipes.load(str(recipe_file))[0], {}, 1)
    assert len(json.loads((tmp_path / "run.json").read_text())["jobs"]) == 1


def test_a_row_that_finds_no_room_is_noted_with_its_file_and_nothing_is_written_after_it(tmp_path: Path) -> None:
    log = RunLog(tmp_path, main=True)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log.event(1, "evaluation", {})
    (tmp_path / "metrics.jsonl").unlink()
    log.event(2, "evaluation", {})
    assert log.failure is not None
    assert str(log.failure) == f"[Errno 28] No space left on device: '{tmp_path}/metrics.jsonl'"
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("trained", ["checkpoints/step_00000002", "model", "bundle"])
def test_a_folder_of_another_recipe_is_refused_with_the_keys_that_differ(tmp_path: Path, recipe_file: Path, trained: str) -> None:
    _run_json(tmp_path, recipe_file, "optim.lr=0.5", "seed=3")
    (tmp_path / trained).mkdir(parents=True)
    with pytest.raises(ValueError, match="belongs to a run of another recipe") as caught:
        run_folder.check_resume(tmp_path, "auto", recipes.load(str(recipe_file))[0])
    message = str(caught.value)
    assert f"--out {tmp_path}" in message
    assert "optim.lr: 0.5 -> 0.001" in message
    assert "seed: 3 -> 0" in message
    run_folder.check_resume(tmp_path, "none", recipes.load(str(recipe_file))[0])


def test_a_recipe_may_be_corrected_while_nothing_is_trained(tmp_path: Path, recipe_file: Path) -> None:
    """What a start leaves that ended before its first checkpoint, or at a full disk while it wrote that."""
    _run_json(tmp_path, recipe_file, "optim.lr=0.5")
    _metrics(tmp_path, '{"step": 1, "loss": 0.1}\n')
    (tmp_path / "lock").touch()
    (tmp_path / "checkpoints" / ".partial_step_00000002").mkdir(parents=True)
    run_folder.check_resume(tmp_path, "auto", recipes.load(str(recipe_file))[0])


def test_a_folder_of_the_same_recipe_watched_otherwise_is_taken(tmp_path: Path, recipe_file: Path) -> None:
    _run_json(tmp_path, recipe_file, "checkpoint.every=77", "log.every=3")
    run_folder.check_resume(tmp_path, "auto", recipes.load(str(recipe_file))[0])


def test_a_resume_path_that_is_not_there_is_refused(tmp_path: Path, recipe_file: Path) -> None:
    with pytest.raises(ValueError, match=r"--resume nowhere: give auto, none, or the folder"):
        run_folder.check_resume(tmp_path, "nowhere", recipes.load(str(recipe_file))[0])


@pytest.mark.parametrize("content", ["{", "{}", '{"recipe": {"name": "x"}}'])
def test_a_run_json_that_cannot_be_read_is_named(tmp_path: Path, recipe_file: Path, content: str) -> None:
    """Left by a full disk or another version of megakd."""
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        run_folder.check_resume(tmp_path, "auto", recipes.load(str(recipe_file))[0])


def test_what_is_set_aside_is_kept_in_numbered_folders(tmp_path: Path) -> None:
    for round_ in ("first", "second"):
        (tmp_path / "a.txt").write_text(round_)
        assert run_folder.archive(tmp_path, [tmp_path / "a.txt"]) is not None
    assert (tmp_path / "previous" / "1" / "a.txt").read_text() == "first"
    assert (tmp_path / "previous" / "2" / "a.txt").read_text() == "second"
    assert run_folder.archive(tmp_path, []) is None


def test_the_next_number_is_free_also_where_one_was_deleted(tmp_path: Path) -> None:
    (tmp_path / "previous" / "7").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("x")
    assert run_folder.archive(tmp_path, [tmp_path / "a.txt"]) == tmp_path / "previous" / "8"


def test_run_json_is_set_aside_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in between leaves what tells the rest from another recipe's."""
    moved: list[str] = []
    monkeypatch.setattr(Path, "rename", lambda self, target: moved.append(self.name))
    run_folder.archive(tmp_path, [tmp_path / name for name in ("run.json", "model", "checkpoints", "zzz")])
    assert moved == ["checkpoints", "model", "zzz", "run.json"]


def test_a_machine_without_git_has_no_commit_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment.commit() is None
