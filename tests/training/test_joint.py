"""Pairs and questions of one step: what was bad in each is counted and judged by itself."""

from __future__ import annotations

import pytest

from megakd.data.bad_samples import BadCounter
from megakd.training.tasks.base import BadSamples


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
