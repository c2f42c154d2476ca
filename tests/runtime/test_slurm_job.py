"""What a run notes of the SLURM job it belongs to. The real `scontrol` is asked by the tests on the cluster."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megakd.runtime import environment

ARRAY = {"SLURM_JOB_ID": "4714", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(("environ", "name"), [({}, None), ({"SLURM_JOB_ID": "4711"}, "4711"), (ARRAY, "4711_3")])
def test_a_job_is_called_as_squeue_calls_it(environ: dict[str, str], name: str | None) -> None:
    assert environment.job_id(environ) == name


def test_the_scripts_say_where_the_log_is_and_scontrol_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    assert environment.log_path({"MEGAKD_LOG": "logs/a.log", "SLURM_JOB_ID": "4711"}) == str(tmp_path / "logs" / "a.log")


def test_without_them_scontrol_is_asked_for_a_path_that_may_hold_spaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "scontrol"
    program.write_text(
        '#!/bin/sh\n[ "$*" = "show job 4711" ] || exit 1\n'
        'printf "JobId=4711 JobName=x\\n   StdErr=/logs/err\\n   StdIn=/dev/null\\n   StdOut=/my logs/out=1.log\\n   Power=\\n"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert environment.log_path({"SLURM_JOB_ID": "4711"}) == "/my logs/out=1.log"
    assert environment.log_path({"SLURM_JOB_ID": "1"}) is None, "a job that scontrol does not know"


def test_a_log_nobody_knows_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment.log_path({}) is None
    assert environment.log_path({"SLURM_JOB_ID": "4711"}) is None


def test_outside_slurm_a_start_is_described_by_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST", "SLURM_RESTART_COUNT", "MEGAKD_LOG"):
        monkeypatch.delenv(name, raising=False)
    of_slurm = {"slurm_job_id": None, "restarts": 0, "log": None}
    assert environment.slurm_record(2, "now") == {**of_slurm, "nodes": socket.gethostname(), "ranks": 2, "started": "now"}
