"""What needs no cluster of submitting and listing runs: this machine's processes, this process, checks, folders, SLURM's words."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import submitit

from megakd.jobs import batch_words, slurm, status, submit
from megakd.jobs.slurm import JobState
from megakd.jobs.submit import Resources
from megakd.runtime.locks import FolderLock, held
from support.processes import python
from support.runs import ds_config, environment, megakd, settings, train

HOLD = "import sys, pathlib; from megakd.runtime.locks import FolderLock\n"
HOLD += "with FolderLock(pathlib.Path(sys.argv[1]), doing='works', remedy='wait'): print('held', flush=True); sys.stdin.read()"


def started(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`megakd ARGUMENTS` in a process of its own."""
    program = [sys.executable, "-m", "megakd.cli", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, env=environment(), timeout=200, check=False)


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Another process holds the folder's lock, or raises CalledProcessError."""
    with python("-c", HOLD, folder, stdin=subprocess.PIPE) as holder:
        assert holder.stdout
        if holder.stdout.readline() != "held\n":
            raise subprocess.CalledProcessError(holder.wait(), HOLD)
        try:
            yield
        finally:
            holder.communicate("")


def answering(folder: Path, monkeypatch: pytest.MonkeyPatch, squeue: str) -> None:
    """A cluster without accounting, whose `squeue` is this shell text; a real one may be up for the tests of tests/slurm."""
    for name, text in {"squeue": squeue, "sacct": "exit 1"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def local(time: str) -> str:
    """As squeue writes it: in this machine's time, without a zone."""
    return datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%dT%H:%M:%S")


def table(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert megakd("jobs", folder) == 0
    return capsys.readouterr().out.splitlines()


def begun(job: str | None, *, log: str | None = None, hour: int = 0) -> list[dict[str, str | None]]:
    """The jobs of run.json: one, of the first day of 2026."""
    return [{"slurm_job_id": job, "log": log, "started": f"2026-01-01T{hour:02d}:00:00+0000"}]


def write_run(run: Path, **content: object) -> Path:
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"recipe": {"optim": {"steps": 40}}, "jobs": [], **content}))
    return run


def test_a_local_job_trains_on_two_ranks_and_is_listed(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    done = started("submit", "--recipe", recipe_file, "--out", run, "--cluster", "local", "--tasks_per_node", 2, "--wait")
    assert done.returncode == 0, done.stderr
    content = json.loads((run / "run.json").read_text())
    assert (content["ranks"], content["slurm_job_id"]) == (2, None)
    assert content["jobs"][0]["log"] in done.stdout
    assert "step 6/6" in Path(content["jobs"][0]["log"]).read_text()
    _, row = table(tmp_path, capsys)
    (note,) = (json.loads(path.read_text()) for path in (run / "slurm").glob("*.json"))
    assert row.split()[:4] == [str(run), f"local:{note['job']}", "finished", "6/6"]
    assert content["jobs"][0]["log"] in row


def test_starting_over_sets_the_earlier_run_aside_and_not_the_job_that_does_it(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(recipe_file, "--out", run).code == 0
    done = started("submit", "--recipe", recipe_file, "--out", run, "--cluster", "local", "--resume", "none", "--wait")
    assert done.returncode == 0, done.stderr
    assert f"finished, log: {run}/slurm/" in done.stdout
    assert len(list((run / "slurm").glob("*_result.pkl"))) == 1
    assert {"run.json", "checkpoints", "model"} <= {path.name for path in (run / "previous" / "1").iterdir()}


@pytest.mark.parametrize("asked", ["none", "checkpoint"])
def test_a_job_that_slurm_starts_again_goes_on_from_its_own_checkpoints_whatever_resume_says(
    asked: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    sets = ("checkpoint.every=2", "checkpoint.keep=2")
    assert train(recipe_file, "--out", run, sets=sets).code == 0
    command = (recipe_file, "--out", run, "--resume", "none" if asked == "none" else run / "checkpoints" / "step_00000004")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    at_first = [] if asked == "none" else ["4"]
    for restart, goes_on in enumerate((at_first, at_first, ["6"])):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        if restart == 1:  # it died before it left a checkpoint of its own
            for path in (run / "checkpoints").iterdir():
                if path.name != "step_00000004" or asked == "none":
                    shutil.rmtree(path)
        done = train(*command, sets=sets)
        assert done.code == 0, done.err
        found = re.findall(r"resuming from \S+: step (\d+) of", done.out)
        assert found == goes_on, (restart, done.out)


def test_waiting_survives_a_failed_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the answers of `squeue` are set here."""
    for name, seconds in {"POLL_SECONDS": 0.01, "SLURM_POLL_SECONDS": 0.01, "RESULT_SECONDS": 0.05}.items():
        monkeypatch.setattr(submit, name, seconds)
    answering(tmp_path, monkeypatch, '[ -e "$0.asked" ] && exec echo "7|CANCELLED|N/A|None"\n> "$0.asked"; echo busy >&2; exit 1')
    job: submitit.SlurmJob[int] = submitit.SlurmJob(tmp_path, "7")
    assert submit.wait([job], "slurm") == 1
    said = capsys.readouterr().err
    assert "asking again later: squeue: SLURM does not answer:\nbusy" in said
    assert "job 7 ended as CANCELLED without a result" in said


def test_a_local_jobs_error_reaches_the_submitter_with_its_log(recipe_file: Path, tmp_path: Path) -> None:
    options = ("--cluster", "local", "--wait", *settings("data.train=/nowhere/*.tar"))
    done = started("submit", "--recipe", recipe_file, "--out", tmp_path / "run", *options)
    assert done.returncode == 2
    assert "/nowhere" in done.stderr
    assert f"log: {tmp_path}/run/slurm/" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_trains_in_the_process_itself(recipe_file: Path, tmp_path: Path) -> None:
    done = started("submit", "--recipe", recipe_file, "--out", tmp_path / "run", "--cluster", "debug")
    assert done.returncode == 0, done.stderr
    assert "step 6/6" in done.stdout
    assert (tmp_path / "run" / "model").is_dir()


def test_what_is_wrong_with_a_run_is_said_before_submission(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(tmp_path / "other", recipe={"name": "other"})
    (tmp_path / "file").write_text("")
    literal = ds_config(tmp_path / "z.json", train_batch_size=17)
    for options, answer in (
        (settings("optim.lrate=1"), "optim.lrate"),
        (("--ds_config", "nowhere.json"), "--ds_config nowhere.json: no such file"),
        (("--ds_config", literal), "train_batch_size"),
        (("--tasks_per_node", 3), "optim.batch"),
        (("--resume", "nowhere"), "--resume nowhere"),
        (("--out", other), f"--out {other}"),
        (("--out", tmp_path / "file" / "run"), "choose another --out"),
        (("--time", "soon"), "--time soon"),
        (("--time", "2"), "--time 2: no longer than --signal_delay 180 s"),
        (("--nodes", 2), "--nodes 2"),
        (("--array", "seed"), "--array seed: write KEY=VALUE"),
        (("--cluster", "moon"), "--cluster moon"),
        (("--qos", "high"), "--qos: not used by --cluster local; leave it out"),
        (("--cluster", "debug", "--time", "10"), "--time: not used by --cluster debug"),
        (("--cluster", "slurm", "--container_mounts", "/data"), "--container_mounts /data: there is no --container_image"),
    ):
        code = megakd("submit", "--recipe", recipe_file, "--out", tmp_path / "run", "--cluster", "local", *options)
        said = capsys.readouterr().err
        assert (code, answer in said) == (2, True), (options, said)
        assert "Traceback" not in said
    assert not (tmp_path / "run" / "run.json").exists()


OPTIONS = ("partition", "account", "qos", "constraint", "mem", "time", "container_image", "container_mounts", "python")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("value", ["gpu\ntouch pwned", "a\rb", "a\u2028b", "", "\udcff"])
def test_no_option_of_submit_breaks_the_line_it_is_written_into(option: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--{option} "):
        batch_words.check(replace(Resources(), **{option: value}), tmp_path, tmp_path)


def test_a_line_break_in_an_option_is_refused_before_output(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert megakd("submit", "--recipe", recipe_file, "--out", tmp_path / "run", "--partition", "gpu\ntouch pwned", "--dry_run") == 2
    said = capsys.readouterr()
    assert ("--partition 'gpu\\ntouch pwned': write" in said.err, said.out) == (True, "")


@pytest.mark.parametrize("name", ["a\nb", "it's", 'a"b', "50%", "back\\slash"])
def test_a_run_folder_that_slurm_would_read_as_something_else_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out .*choose a folder without it"):
        batch_words.check(Resources(), tmp_path / name, tmp_path)
    batch_words.check(Resources(), None, tmp_path)


def test_words_with_spaces_and_shell_signs_stay_single_words(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bash runs the file with another srun, which writes down what it is called with."""
    (tmp_path / "bin").mkdir()
    for name in ("srun", "scontrol"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}.txt\n')
        (tmp_path / "bin" / name).chmod(0o755)
    python, image, folder = "/opt/my env/python; touch pwned", "docker://a b$(touch pwned)", tmp_path / "my runs; touch pwned"
    options = ("--container_image", image, "--python", python, "--out", folder, "--setup", "cd .")
    assert megakd("submit", "--recipe", recipe_file, *options, "--dry_run") == 0
    text = capsys.readouterr().out
    (tmp_path / "here").mkdir()
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path / "here", env={"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "here").iterdir()) == []
    words = (tmp_path / "srun.txt").read_text().splitlines()
    assert f"--container-image={image}" in words
    assert words[-5:-1] == [python, "-u", "-m", "submitit.core._submit"]
    assert f"{folder}/slurm" in words[-1]
    assert all(line.startswith("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line)


def test_an_arrays_folders_have_names_that_a_file_system_takes_and_none_twice(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--array .*longer than 255 bytes"):
        submit.requests(str(recipe_file), [], None, tmp_path, "auto", [f"data.train={'x' * 300}"])
    with pytest.raises(ValueError, match="--array seed=1,1: two runs would share"):
        submit.requests(str(recipe_file), [], None, tmp_path, "auto", ["seed=1,1"])


def test_without_slurm_the_way_to_run_here_is_said(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert megakd("submit", "--recipe", recipe_file, "--out", tmp_path / "run") == 2
    answer = "no SLURM on this machine; submit on a login node, or run here with --cluster local"
    assert answer in capsys.readouterr().err
    assert megakd("submit", "--recipe", recipe_file, "--out", tmp_path / "run", "--nodes", 2, "--dry_run") == 0
    said = capsys.readouterr()
    assert "#SBATCH --nodes=2" in said.out
    assert f"not checked: partition, nodes and GPUs (sinfo: {answer})" in said.err


def test_a_local_dry_run_says_what_would_run(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--cluster", "local", "--tasks_per_node", 2, "--setup", "module load cuda", "--dry_run")
    assert megakd("submit", "--recipe", recipe_file, "--out", tmp_path / "run", *options) == 0
    setup, run = capsys.readouterr().out.splitlines()
    assert setup == "module load cuda"
    assert run == f"python megakd/train.py --recipe {recipe_file} --out {tmp_path}/run --resume auto  # 2 ranks, by submitit"


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("90:00", 90), ("1:30:00", 90), ("1-00", 1440), ("2-01:30", 2970), ("0-0:10:30", 11)]
)
def test_slurms_forms_of_a_time_are_read(text: str, minutes: int) -> None:
    assert Resources(nodes=1, gpus_per_node=0, tasks_per_node=1, time=text, signal_delay=60).minutes == minutes


def test_an_array_is_the_product_of_its_values(recipe_file: Path, tmp_path: Path) -> None:
    top, runs = submit.requests(str(recipe_file), ["optim.lr=1e-4"], None, tmp_path / "a", "auto", ["seed=0,1", "name=x,y/z"])
    assert top == tmp_path / "a"
    assert [run.out.name for run in runs] == ["seed=0,name=x", "seed=0,name=y_z", "seed=1,name=x", "seed=1,name=y_z"]
    assert runs[3].overrides == ("optim.lr=1e-4", "seed=1", "name=y/z")
    array = ["optim.betas=[0.9, 0.98],[0.8,0.9]", "data.train=s3://b/{00,01}.tar,/c/{0..9}.tar"]
    varied = [run.overrides for run in submit.requests(str(recipe_file), [], None, tmp_path / "a", "auto", array)[1]]
    assert varied[0] == ("optim.betas=[0.9, 0.98]", "data.train=s3://b/{00,01}.tar")
    assert varied[3] == ("optim.betas=[0.8,0.9]", "data.train=/c/{0..9}.tar")


def test_gpus_are_counted_from_slurms_words() -> None:
    found = [slurm._gpus(gres) for gres in ("gpu:8", "gpu:a100:4(S:0-1)", "gpu:a100:4,gpu:h100:2,shard:gpu:9x", "(null)", "")]
    assert found[:2] == [8, 4]
    assert found[3:] == [0, 0]


def test_a_lock_is_asked_about_without_taking_it(tmp_path: Path) -> None:
    assert held(tmp_path) is False
    with holding(tmp_path):
        assert held(tmp_path)
        assert held(tmp_path)
    assert held(tmp_path) is False
    with (tmp_path / "lock").open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # asking has left nothing behind


def test_a_run_of_answers_alone_is_finished_with_its_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write_run(tmp_path / "answers_alone") / "bundle").mkdir()
    assert "finished" in table(tmp_path, capsys)[1]


def test_runs_are_listed_with_what_their_folders_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a_name_that_is_long_" * 12
    stopped = write_run(tmp_path / long, jobs=begun(None, log="/logs/one.log"))
    rows = [{"step": 7, "loss": 1.5, "images_per_second": 123.4}, {"step": 7, "event": "checkpoint", "content": None}]
    (stopped / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 8, "lo')
    (write_run(tmp_path / "b" / "done") / "model").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text('{"recipe": ')
    odd = write_run(tmp_path / "odd", recipe=None, jobs=[None, 3])
    lines = table(tmp_path, capsys)
    assert len(lines) == 5
    assert lines[1].split() == [str(stopped), "-", "stopped", "7/40", "123", "1.5000", "/logs/one.log"]
    assert "finished" in lines[2]
    assert "damaged: run.json: Expecting value" in lines[3]
    assert lines[4].split()[:3] == [str(odd), "-", "stopped"]


def test_a_folder_without_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table(tmp_path, capsys)[0].startswith(f"no runs in {tmp_path}")
    assert table(tmp_path / "missing", capsys)[0].startswith("no runs in")


def test_slurm_is_not_asked_more_often_than_every_fifteen_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert megakd("jobs", tmp_path, "--watch", 2) == 2
    assert "--watch 2: give 15 seconds or more" in capsys.readouterr().err


def test_a_preempted_job_is_shown_as_waiting_again(tmp_path: Path) -> None:
    (run,) = status.find(write_run(tmp_path / "run", slurm_job_id="7", jobs=begun("7")))
    assert status.state(run, {"7": JobState("PREEMPTED")}) == "PENDING again"
    assert status.state(run, {"7": JobState("PENDING", "BeginTime")}) == "PENDING again (BeginTime)"
    assert status.state(run, {"7": JobState("RUNNING")}) == "RUNNING"
    assert status.state(run, {}) == "stopped"


def test_a_run_that_is_over_is_not_called_running_with_the_other_runs_of_its_job(tmp_path: Path) -> None:
    """A batch script may train one run after another."""
    crashed = write_run(tmp_path / "crashed", jobs=begun("7", hour=12))
    (write_run(tmp_path / "done", jobs=begun("7", hour=12)) / "model").mkdir()
    before, after = (local(f"2026-01-01T{hour}:00:00+00:00") for hour in (11, 13))

    def states(since: str) -> list[str]:
        return [status.state(run, {"7": JobState("RUNNING", since=since)}) for run in status.find(tmp_path)]

    assert states(before) == ["stopped", "finished"]
    assert states(after) == ["RUNNING", "RUNNING"], "SLURM has started the job again, and the runs are on their way"
    with holding(crashed):
        assert states(before) == ["RUNNING", "finished"]


def test_a_file_system_without_locks_leaves_slurms_word(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", jobs=begun("7", hour=12))
    (run / "lock").mkdir()  # asking about it fails with an error, as there
    (found,) = status.find(tmp_path)
    assert status.state(found, {"7": JobState("RUNNING", since=local("2026-01-01T11:00:00+00:00"))}) == "RUNNING"


def test_slurm_is_asked_neither_about_ended_jobs_again_nor_about_finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the answers of `squeue` are set here."""
    answering(tmp_path, monkeypatch, 'echo "$*" >> "$0.asked"\nprintf "7|FAILED|N/A|None\\n8|RUNNING|N/A|None\\n"')
    for job in "789":
        run = write_run(tmp_path / "runs" / job, jobs=begun(job, hour=12))
    (run / "model").mkdir()
    ended = dict[str, JobState]()
    tables = [status._slurm(status.find(tmp_path / "runs"), ended)[0] for _ in range(2)]
    assert [{job: state.name for job, state in found.items()} for found in tables] == [{"7": "FAILED", "8": "RUNNING"}] * 2
    asked = [re.findall("--jobs=(\\S+)", line) for line in (tmp_path / "squeue.asked").read_text().splitlines()]
    assert asked == [["7,8"], ["8"]]
    with holding(tmp_path / "runs" / "7"):  # somebody has requeued it
        status._slurm(status.find(tmp_path / "runs"), ended)
    assert (tmp_path / "squeue.asked").read_text().splitlines()[-1].count("--jobs=7,8") == 1


def test_a_lock_is_taken_from_a_jobs_own_former_life_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NFS server may keep the lock of a client that has died; here the former life is alive, which the file system cannot tell."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with holding(tmp_path):
        for job, restart in (("8", "2"), ("7", "1")):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
            with pytest.raises(ValueError, match=rf"SLURM job 7, restart 1 works; wait; if it is dead .* rm {tmp_path}/lock"):
                FolderLock(tmp_path, doing="works", remedy="wait")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        with FolderLock(tmp_path, doing="works", remedy="wait"), pytest.raises(subprocess.CalledProcessError), holding(tmp_path):
            pass


def test_a_later_submission_is_the_runs_job(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", jobs=begun("7", log="a"))
    (run / "slurm").mkdir()
    note = {"job": "9", "cluster": "slurm", "submitted": "2026-01-02T00:00:00+0000", "log": "b"}
    (run / "slurm" / "9.json").write_text(json.dumps(note))
    (found,) = status.find(tmp_path)
    assert (found.job, found.log, found.begun) == ("9", "b", None)
    assert status.state(found, {"9": JobState("PENDING", "Priority")}) == "PENDING (Priority)"
