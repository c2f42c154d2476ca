"""The scripts of slurm/ themselves on the cluster: real runs, shrunk only by arguments, that other jobs, limits and stops get at."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from megakd.runtime.exits import EXIT_HUNG
from megakd.runtime.launch import port
from support.runs import TINY_LLAMA, answering, curve, settings
from support.slurm_cluster import Cluster
from support.slurm_jobs import job, sbatch, wait
from support.slurm_scripts import SMALL, STEPS, Script, connections, lost, ranks_of, scontrol, send

pytestmark = [pytest.mark.usefixtures("no_jobs_left"), pytest.mark.timeout(1500)]
ONE = (*SMALL, "--nodes=1")


@dataclass(frozen=True)
class Together:
    """Jobs that were on the cluster at the same time, as starting the trainer is what takes the time."""

    calm: Script
    limited: Script
    intruder: Script
    hung: Script
    crashed: Script
    answers: dict[str, dict[str, str]]
    reached: list[tuple[str, int]]


@pytest.fixture(scope="module")
def together(slurm: Cluster, site: Path, arguments: list[str], undisturbed: Script) -> Together:
    """A run that reaches its time limit, and whose folder a second job tries to take; two, a rank of which stops for ever or is killed."""
    limited = Script(site, "distill_vitbigG", *arguments, options=(*SMALL, "--signal=USR1@239"))
    endless = settings("optim.steps=100000")  # what ends them is not their last step
    # Longer than KillWait: SLURM wakes the halted rank when the other has ended, and it must not come to its own limit before it is killed.
    hung = Script(site, "distill_vitbigG", *arguments, *endless, *settings("watchdog.limit=30"))
    crashed = Script(site, "distill_vitbigG", *arguments, *endless)
    limited.reach(5)
    halted = list(ranks_of(slurm, limited).values())
    send(signal.SIGSTOP, halted)  # so short a run would be over before SLURM looks at time limits, every 30 s; its signal wakes the ranks
    reached = connections(halted[1])
    intruder = Script(site, "distill_vitbigG", *arguments, "--out", limited.run, options=ONE)
    for script, number in ((hung, signal.SIGSTOP), (crashed, signal.SIGKILL)):
        script.reach(5)
        send(number, [ranks_of(slurm, script)["node2"]])
    answers = {intruder.id: wait(intruder.id)}  # while the holders of its folder are halted
    minutes = int(job(limited.id)["RunTime"].split(":")[1])
    scontrol("update", f"JobId={limited.id}", f"TimeLimit={minutes + 4}")  # whose signal is due at once
    wait(limited.id, ("PENDING", "RUNNING"), restarts=1)
    scontrol("update", f"JobId={limited.id}", "TimeLimit=10")
    answers |= {script.id: wait(script.id, ("COMPLETED", "FAILED", "TIMEOUT")) for script in (undisturbed, limited, hung, crashed)}
    return Together(undisturbed, limited, intruder, hung, crashed, answers, reached)


def test_the_script_distils_on_two_nodes_to_a_model_and_its_scores(together: Together) -> None:
    calm = together.calm
    assert together.answers[calm.id]["JobState"] == "COMPLETED", calm.log
    assert "teacher: own architecture (zero3_int8)" in calm.log
    assert [row[0] for row in curve(calm.run)] == list(range(1, STEPS + 1))
    assert set(json.loads((calm.run / "evaluation.json").read_text())) >= {"zero_shot", "retrieval"}
    assert (calm.run / "model" / "open_clip_config.json").is_file()


def test_the_run_names_its_job_and_log(together: Together) -> None:
    calm = together.calm
    recorded = json.loads((calm.run / "run.json").read_text())["jobs"]
    assert [(start["slurm_job_id"], start["ranks"], start["nodes"], start["log"]) for start in recorded] == [
        (calm.id, 2, "node[1-2]", str(calm.log_file))
    ]


def test_the_ranks_met_at_the_first_nodes_own_address(together: Together, slurm: Cluster) -> None:
    """Each node has a loopback of its own, so `localhost` would be another machine for each rank."""
    assert (slurm.address("node1"), port(int(together.limited.id))) in together.reached


def test_a_time_limit_ends_in_a_requeue_that_loses_nothing(together: Together) -> None:
    limited = together.limited
    ended = together.answers[limited.id]
    assert (ended["JobState"], int(ended["Restarts"]) >= 1) == ("COMPLETED", True), limited.log
    assert "stopped by a signal after saving" in limited.log
    assert curve(limited.run) == curve(together.calm.run)


def test_a_second_job_on_the_same_run_folder_refuses_across_nodes(together: Together) -> None:
    intruder = together.intruder
    ended = together.answers[intruder.id]
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), intruder.log
    assert "is at work on this run now" in intruder.log
    assert "Traceback" not in intruder.log


def test_a_hung_rank_ends_the_job_with_the_stacks_of_the_others(together: Together) -> None:
    hung = together.hung
    assert together.answers[hung.id]["JobState"] == "FAILED"
    assert together.answers[hung.id]["Restarts"] == "0"
    assert f"task 0: Exited with exit code {EXIT_HUNG}" in hung.log
    written = list((hung.run / "hung").glob("rank_*.txt"))
    assert [path.name for path in written] == ["rank_00000.txt"]
    assert "on node1" in written[0].read_text()


def test_a_killed_rank_ends_the_job_which_is_not_requeued(together: Together) -> None:
    crashed = together.crashed
    ended = together.answers[crashed.id]
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), crashed.log
    assert "Killed" in crashed.log


def test_work_lost(together: Together) -> None:
    """What ends a job for good loses the steps since the last checkpoint: all, as the default interval is longer than these runs."""
    print("\n| fault | steps lost | seconds: work lost |")
    for what, script in (("a rank hangs, without watchdog.limit", together.hung), ("a rank is killed", together.crashed)):
        steps, seconds = lost(script.log, script.run)
        print(f"| {what} | {steps} | {seconds:.1f} |")
        assert steps >= 5


@pytest.mark.slow
def test_a_sweep_runs_each_combination_in_its_own_folder(
    together: Together, site: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = f"local-dir:{together.calm.run}/model"
    for name, value in {"RECIPE": recipe_file, "TEACHERS": teacher, "MODE": "replicated", "SEEDS": "3 4", "WEIGHTS": "0.5 1.0"}.items():
        monkeypatch.setenv(name, str(value))
    id = sbatch(*ONE, "--array=0-3%2", "slurm/sweep.sh", "--ds_config", "ds_configs/smoke_cpu.json")
    ends = [wait(f"{id}_{task}")["JobState"] for task in range(4)]
    assert ends == ["COMPLETED"] * 4, (site / f"sweep-{id}_0.log").read_text()
    found = [json.loads((site / "runs" / f"sweep-{id}" / str(task) / "run.json").read_text()) for task in range(4)]
    swept = [(run["recipe"]["teacher"]["model"], run["recipe"]["seed"], run["recipe"]["objectives"]["similarity"]) for run in found]
    assert swept == [(teacher, 3, 0.5), (teacher, 3, 1.0), (teacher, 4, 0.5), (teacher, 4, 1.0)]
    assert [run["slurm_job_id"] for run in found] == [f"{id}_{task}" for task in range(4)]


def test_the_vqa_script_adapts_a_decoder_to_a_bundle(site: Path, world: Path, arguments: list[str]) -> None:
    student = next(item for item in arguments if item.startswith("student="))
    decoder = f"{{ architecture = {TINY_LLAMA}, tokenizer = '{world}/tokenizer' }}"
    sets = settings(student, f"decoder={decoder}", *answering(world), "optim.steps=4", "optim.warmup=0", "evaluation.vqa={}")
    script = Script(site, "vqa_lora", *sets, options=ONE)
    assert wait(script.id)["JobState"] == "COMPLETED", script.log
    assert "ZeRO 2, bf16" in script.log
    assert (script.run / "bundle" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_store_that_embed_wrote_is_the_trainings_teacher(site: Path, arguments: list[str]) -> None:
    shared = arguments[: arguments.index(f"optim.steps={STEPS}") - 1]
    embed = Script(site, "embed", *shared)
    assert wait(embed.id)["JobState"] == "COMPLETED", embed.log
    assert "complete, 600 samples" in embed.log
    store = f"teacher.store={site}/stores/distill_vitbigG"
    dry = Script(site, "distill_vitbigG", *arguments, *settings(store), "--dry_run", options=ONE)
    assert wait(dry.id)["JobState"] == "COMPLETED", dry.log
