"""How the scripts' shells end: requeued or not, and what the log says. A stand-in for the training program exits as it is told to."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megakd.runtime.launch import TORCH_VARIABLES
from support.slurm_jobs import job, sbatch, until, wait
from support.slurm_scripts import SMALL, Script, repository, submit_higher

pytestmark = [pytest.mark.usefixtures("no_jobs_left"), pytest.mark.timeout(900)]

# The last argument of the script is its part. Once restarted, it is done at once. Signals are handled before the line that tests wait for,
# and the first of two ranks to end waits until the other has come to it: SLURM may lose a step that it ends while it still starts it.
STAND_IN = r"""#!/bin/bash
part=${*: -1} started="started-$SLURM_JOB_ID"
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || part=ends
case $part in
    saves) trap 'sleep 0.3; exit 85' TERM USR1 ;;
    one-first) trap '' TERM ;;
esac
[ "$SLURM_PROCID" != 0 ] || touch "$started"
echo "rank $SLURM_PROCID of $SLURM_NTASKS, restart ${SLURM_RESTART_COUNT:-0}, log $MEGAKD_LOG, arguments $*"
echo "inherited: ${RANK-}${WORLD_SIZE-}${LOCAL_RANK-}${LOCAL_WORLD_SIZE-}${MASTER_ADDR-}${MASTER_PORT-}."
[ "$SLURM_PROCID" = 0 ] || until [ -e "$started" ]; do sleep 0.1; done
case $part$SLURM_PROCID in
    crashes1) exit 1 ;;
    one-first0) sleep 1; exit 85 ;;
    one-first1) exit 85 ;;
    ends?) exit 0 ;;
esac
for _ in {1..6000}; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def site(slurm: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = repository(tmp_path_factory.mktemp("site"))
    for name in ("python", "megakd"):
        (folder / "bin" / name).write_text(STAND_IN)
    return folder


@pytest.fixture(autouse=True)
def _stand_in(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as here:
        here.setenv("PATH", str(site / "bin"), prepend=":")
        here.chdir(site)
        yield


def started(site: Path, *arguments: object, options: tuple[str, ...] = SMALL, name: str = "distill_vitbigG", ranks: int = 2) -> Script:
    script = Script(site, name, *arguments, options=options)
    until(lambda: script.log.count("rank ") >= ranks)
    return script


def test_arguments_after_the_script_are_passed_on_and_the_log_is_the_real_one(site: Path) -> None:
    script = Script(site, "distill_vitbigG", "--set", "a=two words", "ends", options=(*SMALL, f"--output={site}/elsewhere-%j.log"))
    assert wait(script.id)["JobState"] == "COMPLETED"
    log = (site / f"elsewhere-{script.id}.log").read_text()
    run = f"--out runs/distill_vitbigG-{script.id}"
    assert f"log {site}/elsewhere-{script.id}.log" in log
    assert f"--recipe distill_vitbigG --ds_config ds_configs/zero1_bf16.json {run} --set a=two words ends" in log


def test_ranks_do_not_inherit_those_of_the_submitting_shell(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCH_VARIABLES, "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "localhost")
    script = Script(site, "distill_vitbigG", "ends")
    assert wait(script.id)["JobState"] == "COMPLETED"
    assert script.log.count("inherited: .") == 2


def test_export_none_takes_nothing_from_the_ranks(site: Path) -> None:
    """sbatch --export=NONE would leave srun's tasks without PATH: env.sh's variables must reach them all the same."""
    (site / ".venv" / "bin").mkdir(parents=True)
    # As conda's does, it reads what is not set; the scripts themselves may not.
    (site / ".venv" / "bin" / "activate").write_text(f'old=$NOT_SET_HERE\nPATH="{site}/bin:$PATH"\n')
    script = Script(site, "distill_vitbigG", "ends", options=(*SMALL, "--export=NONE"))
    assert wait(script.id)["JobState"] == "COMPLETED", script.log
    assert script.log.count("rank ") == 2


def test_a_cancelled_job_stays_cancelled_though_its_ranks_saved(site: Path) -> None:
    script = started(site, "saves")
    subprocess.run(["scancel", script.id], check=True)
    until(lambda: "Exited with exit code 85" in script.log)
    assert job(script.id)["JobState"] in ("CANCELLED", "COMPLETING")
    assert wait(script.id)["Restarts"] == "0"


def test_a_refused_requeue_ends_the_job_and_says_how_to_go_on(site: Path) -> None:
    script = started(site, "--out", "runs/mine", "saves", options=(*SMALL, "--no-requeue"))
    subprocess.run(["scancel", "--signal=USR1", script.id], check=True)
    ended = wait(script.id)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "85:0")
    assert "the same command with --out runs/mine after the script's name goes on from what was saved" in script.log


def test_signals_and_time_limits_requeue_once(site: Path) -> None:
    """Jobs at once, as SLURM lets each wait: a rank that a signal ends while it still starts, ranks that end with 85 a second apart
    (--kill-on-bad-exit sends SIGTERM to the slower one, which no longer minds), embed.sh, whose shell gets the signal instead, and an
    array, of which one task has the number of all."""
    alone = (*SMALL, "--nodes=1")  # of two, one may be ended by --kill-on-bad-exit before the signal reaches it; see finish in slurm/job.sh
    starting, apart, embed = (
        started(site, "starts", options=alone, ranks=1),
        Script(site, "distill_vitbigG", "one-first"),
        started(site, "embeds", name="embed"),
    )
    array = sbatch(*alone, "--array=0-2", "slurm/sweep.sh", "saves")
    logs = [site / f"sweep-{array}_{task}.log" for task in range(3)]
    until(lambda: all(log.exists() and "rank " in log.read_text() for log in logs))
    subprocess.run(["scancel", "--signal=USR1", array], check=True)
    subprocess.run(["scancel", "--signal=USR1", starting.id], check=True)
    subprocess.run(["scancel", "--batch", "--signal=USR1", embed.id], check=True)
    for script in (starting, apart, embed):
        ended = wait(script.id, ("COMPLETED", "FAILED"))
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), script.log
    ends = [wait(f"{array}_{task}", ("COMPLETED", "FAILED")) for task in range(3)]
    assert [(ended["JobState"], ended["Restarts"]) for ended in ends] == [("COMPLETED", "1")] * 3
    assert [log.read_text().count("restart 1,") for log in logs] == [1, 1, 1]
    assert "embed --recipe distill_vitbigG --views 1 --out stores/distill_vitbigG embeds" in embed.log


def test_a_preemption_while_the_ranks_still_start_requeues_them_once(site: Path, plain_preemption: None) -> None:
    script = started(site, "starts")
    submit_higher()
    ended = wait(script.id, ("COMPLETED", "FAILED"))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")


def test_a_crashed_rank_ends_the_job_and_is_not_requeued(site: Path) -> None:
    script = Script(site, "distill_vitbigG", "crashes")
    ended = wait(script.id)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "task 1: Exited with exit code 1" in script.log


def test_an_array_that_is_too_long_is_refused_with_the_right_one(site: Path) -> None:
    id = sbatch(*SMALL, "--array=8", "slurm/sweep.sh", "ends")
    assert wait(f"{id}_8")["ExitCode"] == "2:0"
    assert "there are 8 combinations, so sbatch --array=0-7 slurm/sweep.sh" in (site / f"sweep-{id}_8.log").read_text()


def test_a_script_outside_the_repository_says_where_to_go(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    id = sbatch(*SMALL, site / "slurm" / "distill_eva02E.sh")
    assert wait(id)["ExitCode"] == "2:0"
    assert f"error: {tmp_path} is not megakd's repository: cd there" in (tmp_path / f"distill_eva02E-{id}.log").read_text()


def test_a_log_folder_that_is_missing_leaves_no_log_which_the_scripts_avoid(site: Path) -> None:
    """SLURM opens the log on the node, and where it cannot the job ends without a word; so the scripts log where sbatch was called."""
    lost = sbatch(*SMALL, "--output=missing/%j.log", "slurm/distill_vitbigG.sh", "ends")
    assert wait(lost)["JobState"] != "COMPLETED"
    assert not (site / "missing").exists()
    for script in (site / "slurm").glob("*.sh"):
        outputs = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH --output=")]
        assert all("/" not in line for line in outputs), script


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (("--partition=nowhere",), "invalid partition specified: nowhere"),
        (("--gpus-per-node=9",), "node configuration is not available"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused_by_sbatch_at_once(site: Path, options: tuple[str, ...], answer: str) -> None:
    command = ["sbatch", *SMALL, *options, "slurm/distill_vitbigG.sh"]
    sent = subprocess.run(command, capture_output=True, text=True, check=False)
    assert sent.returncode != 0
    assert answer in sent.stderr
    assert "Traceback" not in sent.stderr
