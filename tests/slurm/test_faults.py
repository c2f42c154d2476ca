"""One job that is stopped in every way a cluster has, one whose disk fills, and one that goes on with fewer nodes: the curve is that of
an undisturbed run. `pytest tests/slurm -k "lost or full_disk" -s` prints what each stop cost."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megakd.runtime import checkpoint
from support.runs import curve, rows, settings
from support.slurm_cluster import Cluster
from support.slurm_jobs import job, until, wait
from support.slurm_scripts import SMALL, Script, lost, preempted, ranks_of, scontrol, send, submit_higher

# Minutes: test_script_runs.py has these stops one by one, of several jobs at once, among the quick tests.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_jobs_left"), pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Stop:
    """A stop, and what it cost."""

    what: str
    step: int  # the last one before it
    resumed: int  # the one that the next start went on from
    redone: float  # seconds of the steps in between, which are done twice
    queued: float  # seconds until SLURM started the job again
    starting: float  # seconds from there to the next step


@dataclass(frozen=True)
class Disturbed:
    script: Script
    answer: dict[str, str]
    stops: list[Stop]
    halfway: Path  # the run folder's copy after the first stop


@pytest.fixture(scope="module")
def disturbed(slurm: Cluster, site: Path, arguments: list[str], undisturbed: Script) -> Disturbed:
    """The same job preempted with and without its own signal, requeued, and robbed of a node; checkpoints as often as by default."""
    ended = wait(undisturbed.id)  # or the preemptions would be its own
    assert ended["JobState"] == "COMPLETED", undisturbed.log
    script, halfway = Script(site, "distill_vitbigG", *arguments), site / "halfway"

    def preempt() -> None:
        with preempted(script.id, site):
            shutil.copytree(script.run, halfway)

    def preempt_plainly() -> None:
        slurm.reconfigure(user_signal=False)
        submit_higher()

    def lose_a_node() -> None:
        # Halted, as the run would be over in five seconds, and one that has ended takes no step again.
        send(signal.SIGSTOP, ranks_of(slurm, script).values())
        slurm.reconfigure(node_timeout=10)
        slurm.kill_node("node2")
        wait(script.id, ("PENDING",))
        slurm.reconfigure()  # a busy machine is not lost another time
        slurm.start_node("node2")

    stops = [  # early, so that the run has not ended before one on a busy machine
        _stop(script, "preemption, the job's own signal", 8, preempt),
        _stop(script, "preemption, SIGTERM alone", 16, preempt_plainly),
        _stop(script, "scontrol requeue", 24, lambda: scontrol("requeue", script.id)),
        _stop(script, "a node loses its power", 32, lose_a_node),
    ]
    return Disturbed(script, wait(script.id), stops, halfway)


def _stop(script: Script, what: str, step: int, act: Callable[[], None]) -> Stop:
    """Stop the job by `act` after `step`, and follow it until it trains again."""
    script.reach(step)
    starts, began, before = int(job(script.id)["Restarts"]), time.monotonic(), len(script.log)
    act()
    wait(script.id, ("RUNNING",), restarts=starts + 1)
    running = time.monotonic()
    trains = re.compile(rf"restart {starts + 1}\n(.*\n)*step ")
    until(lambda: trains.search(script.log), tell=lambda: f"{what}: {job(script.id)}\n{script.log[-4000:]}")
    training = time.monotonic()
    # From the log, which is appended to: metrics.jsonl forgets what is done again.
    lines = re.findall(r"^step (\d+)/.* seconds: (.*)$", script.log[: script.log.index(f"restart {starts + 1}\n")], re.MULTILINE)
    last = int(lines[-1][0])
    resumed = re.findall(r"resuming from \S+: step (\d+) of", script.log[before:])
    again = int(resumed[-1]) if resumed else 0
    lost = dict(lines[-last:])
    redone = sum(float(value) for number, parts in lost.items() if int(number) > again for value in parts.split()[1::2])
    return Stop(what, last, again, redone, running - began, training - running)


def test_a_job_stopped_in_every_way_ends_where_an_undisturbed_one_does(disturbed: Disturbed, undisturbed: Script) -> None:
    assert disturbed.answer["JobState"] == "COMPLETED", disturbed.script.log
    assert disturbed.answer["Restarts"] == "4"
    assert curve(disturbed.script.run) == curve(undisturbed.run)


def test_preemption_loses_no_step_with_either_setting_of_the_cluster(disturbed: Disturbed) -> None:
    assert [stop.resumed - stop.step for stop in disturbed.stops[:2]] == [0, 0]


def test_work_lost(disturbed: Disturbed) -> None:
    """What a stop without a warning loses is the steps since the last checkpoint, never more."""
    print("\n| fault | last step | goes on from | seconds: work lost | until SLURM starts it again | until the next step |")
    for stop in disturbed.stops:
        print(f"| {stop.what} | {stop.step} | {stop.resumed} | {stop.redone:.1f} | {stop.queued:.1f} | {stop.starting:.1f} |")
    assert all(0 < stop.resumed <= stop.step for stop in disturbed.stops)
    saved = [stop.resumed for stop in disturbed.stops]
    assert saved == sorted(saved)


def test_the_run_goes_on_with_fewer_nodes(disturbed: Disturbed, undisturbed: Script, site: Path, arguments: list[str]) -> None:
    """The same samples in the same order; equal but for the rounding of sums in another order, in bf16 here."""
    one = Script(site, "distill_vitbigG", *arguments, "--out", disturbed.halfway, options=(*SMALL, "--nodes=1"))
    assert wait(one.id)["JobState"] == "COMPLETED", one.log
    found, expected = rows(disturbed.halfway), rows(undisturbed.run)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=0.02)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_same_command_goes_on(
    slurm: Cluster, undisturbed: Script, site: Path, arguments: list[str]
) -> None:
    run = slurm.disk / "run"
    more = [*arguments, *settings("checkpoint.every=20", "checkpoint.keep=1"), "--out", run]
    full = Script(site, "distill_vitbigG", *more)
    until(lambda: checkpoint.available(run))
    subprocess.run(["dd", "if=/dev/zero", f"of={slurm.disk / 'filler'}", "bs=4096"], capture_output=True, check=False)
    ended = wait(full.id)
    assert ended["JobState"] == "FAILED"
    assert ended["Restarts"] == "0"
    assert "No space left on device" in full.log
    assert "make room there or choose another --out" in full.log
    saved = checkpoint.latest_valid(run, print)
    assert saved is not None
    steps, seconds = lost(full.log, run)
    print(f"\n| the disk is full | {steps} | {seconds:.1f} |")
    subprocess.run(["mount", "-o", "remount,size=100m", slurm.disk], check=True)
    again = Script(site, "distill_vitbigG", *more)
    assert wait(again.id)["JobState"] == "COMPLETED", again.log
    assert f"resuming from {saved}" in again.log
    assert curve(run) == curve(undisturbed.run)
