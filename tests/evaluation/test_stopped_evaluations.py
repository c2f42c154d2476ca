"""Signals that come while a run evaluates: every rank leaves soon, what is done is kept, and the same command comes to the same results."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.runtime import checkpoint
from megakd.runtime.exits import EXIT_SAVED, Interrupted
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller, StopRequest
from support.forked import Forked
from support.runs import TINY_LLAMA, Finished, answering, curve, events, finish, settings, start_ranks, wait_for

pytestmark = pytest.mark.timeout(400)


def started(recipe: Path, world: Path, out: Path) -> list[Forked]:
    """Two ranks without a launcher, whose exit codes are seen. One question a batch: an evaluation takes a few hundred of them."""
    sets = (
        *answering(world),
        f"decoder.architecture={TINY_LLAMA}",
        f"decoder.tokenizer={world}/tokenizer",
        f"evaluation.retrieval={{ test = '{world}/test/*.tar' }}",
        "evaluation.vqa_batch=1",
        "evaluation.every=2",
        "checkpoint.every=3",
        "optim.steps=4",
    )
    return start_ranks("--recipe", recipe, "--out", out, *settings(*sets))


def answered(run: Path) -> int:
    """Answers in the files of the two ranks: of an evaluation that is going on."""
    return sum(len(path.read_text().splitlines()) - 1 for path in (run / "answers").glob("test.rank*.jsonl"))


@dataclass
class Story:
    """Stopped in the evaluation of step 2, which is no checkpoint's, then in the last one; ends of both ranks, and what was left."""

    undisturbed: Path
    disturbed: Path
    ends: list[list[Finished]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    saved: list[list[str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(recipe_file: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("interrupted")
    found = Story(folder / "undisturbed", folder / "disturbed")

    def lived(out: Path, until: Callable[[], bool] | None) -> None:
        ranks = started(recipe_file, world, out)
        try:
            if until is not None:
                wait_for(until, ranks[0])
                ranks[1].send_signal(signal.SIGTERM)
        finally:
            found.ends.append([finish(rank) for rank in ranks])
        found.answers.append(answered(out))
        found.saved.append([path.name for path in checkpoint.available(out)])

    lived(found.undisturbed, None)
    lived(found.disturbed, lambda: answered(found.disturbed) >= 10)
    lived(found.disturbed, lambda: bool(events(found.disturbed, "evaluation")) and answered(found.disturbed) >= 10)
    lived(found.disturbed, None)
    return found


def test_both_ranks_leave_an_evaluation_with_the_documented_code(story: Story) -> None:
    codes = [[end.code for end in ends] for ends in story.ends]
    assert codes == [[0, 0], [EXIT_SAVED] * 2, [EXIT_SAVED] * 2, [0, 0]], story.ends[1][0].out[-3000:]
    questions = json.loads((story.undisturbed / "evaluation.json").read_text())["vqa"]["test"]["questions"]
    assert all(10 <= left < questions for left in story.answers[1:3])
    assert story.answers[3] == 0
    assert all("stopped by a signal after saving" in ends[0].out for ends in story.ends[1:3])


def test_the_step_that_was_evaluated_is_saved_first(story: Story) -> None:
    assert story.saved[1] == ["step_00000002"]
    assert story.saved[2] == ["step_00000003", "step_00000004"]


def test_the_same_command_comes_to_the_results_of_an_undisturbed_run(story: Story) -> None:
    assert curve(story.disturbed) == curve(story.undisturbed)
    mine, theirs = ([untimed(event["content"]) for event in events(run, "evaluation")] for run in (story.disturbed, story.undisturbed))
    assert [found["step"] for found in mine] == [2, 4], "the evaluation that was left is made up for"
    assert mine == theirs
    ended = [untimed(json.loads((run / "evaluation.json").read_text())) for run in (story.disturbed, story.undisturbed)]
    assert ended[0] == ended[1] == mine[-1]
    answers = [(run / "answers" / "test.jsonl").read_text().splitlines() for run in (story.disturbed, story.undisturbed)]
    assert answers[0] == answers[1]


def untimed(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name != "images_per_second"}


@pytest.mark.parametrize(("ranks", "rows", "size"), [(1, 9, 2), (2, 9, 2), (3, 2, 4), (3, 25, 4), (2, 0, 4)])
def test_every_rank_gets_its_batches_and_asks_equally_often(ranks: int, rows: int, size: int) -> None:
    class Counted(StopPoller):
        asked = 0

        def check(self) -> None:
            self.asked += 1

    asked = set()
    for rank in range(ranks):
        own = list(range(rows * rank // ranks, rows * (rank + 1) // ranks))
        batches = [own[start : start + size] for start in range(0, len(own), size)]
        here = Counted(World(rank, ranks, torch.device("cpu")))
        assert list(here.between(iter(batches), rows, size)) == batches
        asked.add(here.asked)
    assert len(asked) == 1


def test_a_signal_is_noticed_before_the_next_few_batches() -> None:
    with StopRequest() as stop:
        batches = StopPoller(World(0, 1, torch.device("cpu")), stop).between(iter(range(99)), 99, 1)
        assert [next(batches) for _ in range(6)] == [0, 1, 2, 3, 4, 5]
        signal.raise_signal(signal.SIGTERM)
        assert [next(batches), next(batches)] == [6, 7]
        with pytest.raises(Interrupted):
            next(batches)
