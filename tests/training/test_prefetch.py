"""`data.prefetch`: the next batch, and what teachers say of it, ahead of its step: the same numbers, and nothing too early on streams."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megakd.data.pairs import Batch
from megakd.runtime import checkpoint
from megakd.runtime.exits import EXIT_SAVED
from megakd.runtime.side_stream import Handed, SideStream
from megakd.training.feed import Feed
from support import PROGRAMS
from support.runs import ENSEMBLE, KD, TINY_LLAMA, answering, curve, ds_config, ran, rows, run_ranks, settings, train, zero
from support.stream_order import StreamOrder, streams_of_a_gpu

AHEAD = "data.prefetch=true"
STEPS, EVERY, BATCH = 7, 4, 16
TAUGHT = (*KD, *ENSEMBLE, f"optim.steps={STEPS}", f"checkpoint.every={EVERY}")
# The first batch, and the one behind a save, are not taken ahead.
TAKEN_AHEAD = STEPS - 2


@pytest.fixture(scope="module")
def plain(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(recipe_file, tmp_path_factory.mktemp("plain") / "run", *TAUGHT)


def _ahead(run: Path, count: str = "batches") -> int:
    return sum(int(row["ahead"][count]) for row in rows(run))


def test_the_curve_is_that_of_a_run_without_it_bit_for_bit(recipe_file: Path, plain: Path, tmp_path: Path) -> None:
    finished = train(recipe_file, "--out", tmp_path / "run", sets=(*TAUGHT, AHEAD))
    assert finished.code == 0, finished.err
    assert curve(tmp_path / "run") == curve(plain)
    assert _ahead(tmp_path / "run") == TAKEN_AHEAD
    assert not any("ahead" in row for row in rows(plain))
    assert "ahead: the next batch is taken, and shown to teacher, ensemble.second, while the device works on a step\n" in finished.out


@pytest.mark.slow
def test_so_it_is_of_questions_in_micro_batches_beside_pairs(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    config = ds_config(tmp_path / "ds.json", train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=2)
    decoder = (f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer", *answering(world))
    asked = (*KD, *decoder, "evaluation={}", "optim.steps=3")
    one, other = (ran(recipe_file, tmp_path / name, *asked, *more, config=config) for name, more in (("plain", ()), ("ahead", (AHEAD,))))
    assert curve(one) == curve(other)
    assert _ahead(other) == 1  # the recipe saves every second step


def test_a_signal_drops_what_was_taken_ahead_and_the_run_goes_on_as_if_there_had_been_none(
    recipe_file: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fetch = tmp_path / "run", Feed.fetch

    def signalled(feed: Feed, step: int) -> None:
        fetch(feed, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Feed, "fetch", signalled)
    assert train(recipe_file, "--out", out, sets=(*TAUGHT, AHEAD)).code == EXIT_SAVED
    progress, _ = checkpoint.load(checkpoint.available(out)[-1])
    assert (progress.step, progress.position) == (3, 3 * BATCH)
    monkeypatch.undo()
    ran(recipe_file, out, *TAUGHT, AHEAD)
    assert curve(out) == curve(plain)


def _ordered(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> StreamOrder:
    sets = (*KD, "optim.steps=4", "checkpoint.every=3", AHEAD)
    with streams_of_a_gpu(monkeypatch) as order:

        def copied(tensor: Tensor) -> Tensor:
            order.forget(tensor)
            return tensor.clone()

        def moved(batch: Batch, device: Any, non_blocking: bool) -> Batch:
            """As onto a GPU: the tensors there are others than the loader's."""
            copies = {name: {role: copied(one) for role, one in getattr(batch, name).items()} for name in ("pixels", "tokens")}
            return dataclasses.replace(batch, **copies)

        monkeypatch.setattr(Batch, "to", moved)
        ran(recipe, out, *sets)
    return order


def test_on_streams_nothing_is_read_early_and_no_memory_is_given_out_early(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = _ordered(recipe_file, tmp_path / "run", monkeypatch)
    assert order.found == []
    assert order.handed >= 4 * 4, "pixels and tokens of the student, embeddings of images and texts, in each step"


def _without_waiting(handed: Handed[Any]) -> Any:
    return handed.value


BREAKS = {
    "no wait for the other stream": (Handed, "take", _without_waiting, "reads what another stream has not finished"),
    "no wait for the models": (SideStream, "follow", lambda side: None, "reads what another stream has not finished"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_wait_that_is_left_out_shows(broken: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, instead, words = BREAKS[broken]
    monkeypatch.setattr(owner, name, instead)
    order = _ordered(recipe_file, tmp_path / "run", monkeypatch)
    assert any(words in line for line in order.found)


def test_memory_that_is_not_kept_shows(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamOrder, "keep_for", lambda *_: None)
    order = _ordered(recipe_file, tmp_path / "run", monkeypatch)
    assert any("its memory is given out again" in line for line in order.found)


PARTED = (*TAUGHT, "teacher.mode=zero3_int8")


def test_on_two_ranks_a_partitioned_teacher_is_asked_in_its_own_step_and_gathers_ahead(recipe_file: Path, tmp_path: Path) -> None:
    """In two micro-batches. Blocks are gathered one by one; where DeepSpeed may fetch none ahead, each is waited for; the numbers stay."""
    limits = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 30_000, "stage3_max_reuse_distance": 0}
    jsons = {}
    for name, bucket in (("overlapped", 10_000), ("in turn", 0)):
        jsons[name] = tmp_path / f"{name}.json"
        jsons[name].write_text(json.dumps({"zero_optimization": limits | {"stage3_prefetch_bucket_size": bucket}}), encoding="utf-8")
    student = ds_config(tmp_path / "student.json", zero_optimization=zero(2), train_micro_batch_size_per_gpu=4)
    runs = {
        "plain": ("teacher.ds_config=" + str(jsons["in turn"]),),
        "ahead": ("teacher.ds_config=" + str(jsons["overlapped"]), AHEAD),
    }
    jobs = [
        {"arguments": ["--recipe", str(recipe_file), "--out", str(tmp_path / name), "--ds_config", str(student), *settings(*PARTED, *more)]}
        for name, more in runs.items()
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    said = run_ranks(PROGRAMS / "train_jobs.py", tmp_path / "jobs.json", tmp_path / "outcomes")[0]
    assert curve(tmp_path / "ahead") == curve(tmp_path / "plain")
    assert "shown to ensemble.second, while" in said
    assert "; teacher: in its own step, as ranks talk in it" in said
    assert _ahead(tmp_path / "ahead") == TAKEN_AHEAD
    gathers = {name: [_ahead(tmp_path / name, f"gathers_{when}") for when in ("ahead", "late")] for name in runs}
    assert gathers["plain"][0] == 0
    assert sum(gathers["ahead"]) == sum(gathers["plain"])
    # DeepSpeed saw the order of blocks when 8 bit were compared with 16. The first of each tower is late, and one more of so small ones.
    for row in rows(tmp_path / "ahead"):
        assert row["ahead"]["gathers_ahead"] == 2 * row["ahead"]["gathers_late"] == 12


def test_nothing_is_taken_ahead_of_a_save_an_evaluation_or_the_end(
    recipe_file: Path, evaluations: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, taken = Feed.fetch, list[int]()

    def noted(feed: Feed, step: int) -> None:
        taken.append(step)
        fetch(feed, step)

    monkeypatch.setattr(Feed, "fetch", noted)
    run = ran(recipe_file, tmp_path / "run", *TAUGHT, AHEAD, evaluations[0], "evaluation.every=3")
    assert taken == [1, 2, 5]  # 4 steps lie before a save, 3 and 6 before an evaluation, 7 before the end
    assert _ahead(run) == 3
