"""hpZ of ZeRO++ on gloo ranks: what is learned is ZeRO-3's to the last bit, also when it goes on from a checkpoint."""

from __future__ import annotations

import json

from support import PROGRAMS
from support.runs import run_ranks


def test_backwards_that_gather_from_their_groups_copy_learn_what_zero_3_learns() -> None:
    first, *_ = run_ranks(PROGRAMS / "hpz.py", ranks=4)
    (line,) = [line for line in first.splitlines() if line.startswith("RESULTS")]
    found = json.loads(line.removeprefix("RESULTS"))
    assert found == {kind: dict.fromkeys(("norms", "end", "moved", "resumed"), True) for kind in ("bf16", "fp32")}
