"""Tasks side by side in one run: what is bad in each is counted and judged by itself, and a further one needs no change elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megakd.data.bad_samples import BadCounter
from megakd.training import prepare
from megakd.training.tasks.base import BadSamples, StepPart, Task
from support.runs import ran, rows


class Third(Task):
    """Draws the logit scale to 5, on data that have no more than positions; it is also its `TaskData`."""

    weights, adds_up, items, in_a_step = {"five": 2.0}, False, "things", 1
    key, result, sets = "things", "third", True

    def signature(self, *, of_names: bool = False) -> int:
        return 3

    def describe(self) -> list[str]:
        return ["things: no end of them"]

    def start(self, *_: Any) -> Third:
        return self

    def extend(self, module: Any, device: Any) -> Any:
        return module

    def keep_replica(self) -> None:
        pass

    def open(self, progress: Any) -> Any:
        batch = SimpleNamespace(next_position=-1, bad=BadCounter(4, {"too_thin": 1}))
        batch.to = lambda device, non_blocking: batch
        return contextlib.nullcontext(iter(lambda: batch, None))

    def part(self, batch: Any, taught: Any, step: int) -> StepPart:
        return StepPart([{}, {}], lambda outputs: {"five": (outputs["scale"] - 5).square()})

    def evaluate(self, weights: Any, step: int, folder: Path, interruptions: Any) -> dict[str, Any]:
        return {"third": weights["clip.logit_scale"].exp().item()}

    def write(self, weights: Any, folder: Path) -> None:
        (folder / "third").mkdir()


def test_a_further_task_learns_is_scored_and_written_beside_the_pairs(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two micro-batches, with whose losses its own do not add up."""
    plain, prepared, config = ran(recipe_file, tmp_path / "plain"), prepare.prepare, tmp_path / "halves.json"
    config.write_text('{"train_micro_batch_size_per_gpu": 8}', encoding="utf-8")

    def with_a_third(*given: Any) -> prepare.PreparedRun:
        plan = prepared(*given)
        return dataclasses.replace(plan, tasks=(*plan.tasks, Third()))

    monkeypatch.setattr(prepare, "prepare", with_a_third)
    run = ran(recipe_file, tmp_path / "run", "data.max_bad_fraction=0.3", config=config)
    losses = [row["losses"]["five"] for row in rows(run)]
    assert losses[-1] < losses[0]
    for row, other in zip(rows(run), rows(plain), strict=True):
        assert row["losses"].keys() == {*other["losses"], "five"}
        assert row["bad_samples"] == {"too_thin": row["step"]}
    assert rows(run)[0]["loss"] == pytest.approx(rows(plain)[0]["loss"] + 2 * losses[0], rel=1e-4)
    assert (run / "third").is_dir()
    assert json.loads((run / "evaluation.json").read_text())["third"] == pytest.approx(rows(run)[-1]["scale"], abs=2.0)


def skipped(bad_questions: int, reason: str = "corrupt_image") -> BadSamples:
    questions = BadCounter(seen=64)
    questions.add(reason, "here: question 3", bad_questions)  # type: ignore[arg-type]
    return BadSamples({"samples": BadCounter(seen=4096), "questions": questions})


def test_bad_questions_are_not_lost_among_good_pairs() -> None:
    found = skipped(32)
    found.check(0.5, {"samples": 4096, "questions": 64})
    with pytest.raises(ValueError, match=r"32 of 64 questions are unusable \(50\.00%\), .*: corrupt_image 32\. .*Repair the files, or"):
        found.check(0.4, {"samples": 4096, "questions": 64})
    found.check(0.4, {"samples": 4096, "questions": 65})
    few_pairs = BadSamples({"samples": BadCounter(seen=16), "questions": BadCounter(seen=64)})
    few_pairs.by_items["samples"].add("bad_text", "0.tar: a", 16)
    with pytest.raises(ValueError, match="16 of 16 samples are unusable"):
        few_pairs.check(0.4, {"samples": 16, "questions": 64})


def test_the_remedy_for_long_conversations_is_their_length() -> None:
    with pytest.raises(ValueError, match=r"Raise answers\.max_length, or raise data\.max_bad_fraction"):
        skipped(2, "too_long").check(0.01, {"samples": 1, "questions": 1})


def test_both_counts_survive_the_sum_over_ranks_and_add_up_by_reason() -> None:
    one = skipped(2)
    one.by_items["samples"].add("corrupt_image", "0.tar: a", 3)
    assert BadSamples.from_list(one.to_list(), one) == one
    one.merge(skipped(1, "too_long"))
    assert one.counts == {"corrupt_image": 5, "too_long": 1}
    assert [counter.seen for counter in one.by_items.values()] == [8192, 128]
