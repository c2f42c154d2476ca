"""The end of a batch shell when SLURM's controller is busy, refuses, or knows better: jobs/requeue.sh against answers that are set here.

What a real controller answers is in the tests on the cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support.runs import REPOSITORY

# Answers from a queue of files for `show` and `requeue`, of which the last stays; an answer FAIL is a controller that does not reply.
SCONTROL = """#!/bin/bash
echo "$*" >> asked
case "$*" in *requeue*) kind=requeue ;; *) kind=show ;; esac
answer=$(head -n 1 $kind)
[ "$(wc -l < $kind)" -le 1 ] || sed -i 1d $kind
case $answer in
    FAIL) echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1 ;;
    REFUSE) echo "Requested operation is presently disabled for job 7" >&2; exit 1 ;;
esac
echo "$answer"
"""
# The shell's own naps are skipped; the long sleep stands for SLURM's end of the shell.
SLEEP = '#!/bin/sh\n[ "$1" = 600 ] && echo "requeued" && kill -KILL "$PPID"\nexit 0\n'
RUNNING = "JobId=7 JobName=a JobState=RUNNING Reason=None Restarts=0 PreemptTime=None StdOut=a"
PREEMPTED = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:00:00")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name, text in {"scontrol": SCONTROL, "sleep": SLEEP}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def end(here: Path, code: int, show: list[str], requeue: list[str], **variables: str) -> tuple[int, str, list[str]]:
    """Exit code, output and questions of a shell whose ranks ended with `code`."""
    for name, answers in {"show": show, "requeue": requeue}.items():
        (here / name).write_text("".join(f"{answer}\n" for answer in answers))
    script = f'set -uo pipefail; source {REPOSITORY}/megakd/jobs/requeue.sh; finish {code} "this command"'
    environ = {"PATH": f"{here}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **variables}
    done = subprocess.run(["bash", "-c", script], cwd=here, env=environ, capture_output=True, text=True, timeout=60, check=False)
    asked = (here / "asked").read_text().splitlines() if (here / "asked").exists() else []
    return done.returncode, done.stdout, asked


@pytest.mark.parametrize("code", [85, 138, 140])
def test_a_controller_that_does_not_answer_for_a_while_is_asked_again(here: Path, code: int) -> None:
    _, said, asked = end(here, code, ["FAIL", "FAIL", RUNNING], ["FAIL", "FAIL", ""])
    assert said.splitlines()[-1] == "requeued"
    assert asked.count("requeue 7") == 3


def test_a_job_of_which_nothing_is_known_is_requeued(here: Path) -> None:
    _, said, _ = end(here, 85, ["FAIL"], [""])
    assert said.splitlines()[-1] == "requeued"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING"])
def test_a_job_that_is_known_to_end_by_itself_is_not_requeued(here: Path, state: str) -> None:
    code, said, asked = end(here, 85, [RUNNING.replace("RUNNING", state)], [""])
    assert (code, "it is not requeued" in said) == (85, True)
    assert not any("requeue" in question for question in asked)


def test_a_refusal_is_final_and_the_way_to_go_on_is_said(here: Path) -> None:
    code, said, asked = end(here, 85, [RUNNING], ["REFUSE"])
    assert code == 85
    assert "SLURM did not requeue job 7; this command goes on from what was saved" in said
    assert asked.count("requeue 7") == 3


@pytest.mark.parametrize(("record", "back"), [(PREEMPTED, True), (RUNNING, False), ("FAIL", False)])
def test_ranks_that_sigterm_ended_come_back_after_a_preemption_alone(here: Path, record: str, back: bool) -> None:
    code, said, _ = end(here, 143, [record], [""])
    assert ("requeued" in said) == back
    assert back or code == 143


@pytest.mark.parametrize("code", [0, 1, 2, 86, 87])
def test_other_ends_ask_nothing(here: Path, code: int) -> None:
    assert end(here, code, [RUNNING], [""]) == (code, "", [])


TASK = RUNNING.replace("JobId=7", "JobId=7 ArrayJobId=7 ArrayTaskId=2")


@pytest.mark.parametrize(("record", "array", "named"), [(TASK, "7", "7_2"), ("FAIL", "7", "7_2"), (RUNNING, "3", "7")])
def test_a_task_of_an_array_means_itself_alone(here: Path, record: str, array: str, named: str) -> None:
    """The last one of an array has SLURM_JOB_ID = SLURM_ARRAY_JOB_ID, by which scontrol would requeue all of them. A job that was submitted
    from such a task has its variables, and another record."""
    _, said, asked = end(here, 85, [record], [""], SLURM_ARRAY_JOB_ID=array, SLURM_ARRAY_TASK_ID="2")
    assert said.splitlines()[-1] == "requeued"
    assert asked[-1] == f"requeue {named}"


def test_the_advice_names_the_folder_that_the_arguments_name() -> None:
    script = 'eval "$(sed -n "/^out_of/,/^}/p" slurm/job.sh)"; out_of runs/a "$@"'
    for arguments, folder in (
        (["--set", "a=1"], "runs/a"),
        (["--out", "runs/b c", "--set", "a=1"], "runs/b c"),
        (["--out", "runs/b", "--out=runs/c"], "runs/c"),
    ):
        done = subprocess.run(["bash", "-uc", script, "-", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert done.stdout == f"{folder}\n"
