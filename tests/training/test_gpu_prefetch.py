"""The step with `data.prefetch` and without, on a CUDA device: the same run in turns, in one process, alone on the device."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import pytest

from support.runs import losses, ran, rows

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]
SECONDS = 20.0  # after which no further round begins; `make gpu` has 38 for all of it
EVERY, STEPS = 4, 20  # the device is waited for where a row is written


RECIPE = """
name = "timed"
data = {{ train = "{world}/train/*.tar", workers = 6 }}
student = {{ model = "ViT-S-32" }}
teacher = {{ model = "ViT-B-16", pretrained = "random" }}
objectives = {{ contrastive = 1.0, similarity = 1.0 }}
optim = {{ steps = {steps}, batch = 256, lr = 1e-4, warmup = 10 }}
checkpoint = {{ every = 1000 }}
log = {{ every = {every} }}
"""


def test_the_step_is_timed_with_and_without_a_batch_ahead(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A replica in bf16 that costs about as much as the student. Both give the same losses to what a device's own order of sums changes."""
    recipe = tmp_path / "timed.toml"
    recipe.write_text(RECIPE.format(world=world, steps=STEPS, every=EVERY), encoding="utf-8")
    rates: dict[bool, list[float]] = {False: [], True: []}
    start, number = time.perf_counter(), 0
    while number < 1 or time.perf_counter() - start < SECONDS:
        runs = {ahead: ran(recipe, tmp_path / f"{ahead}-{number}", f"data.prefetch={ahead}".lower()) for ahead in rates}
        for ahead, run in runs.items():
            rates[ahead] += [row["images_per_second"] for row in rows(run)[1:]]
        assert losses(runs[True]) == pytest.approx(losses(runs[False]), rel=0.02)
        number += 1
    last = rows(runs[True])[-1]
    assert sum(row["ahead"]["batches"] for row in rows(runs[True])) == STEPS - 1
    before, after = (median(rates[ahead]) for ahead in rates)
    with capsys.disabled():
        print(f"\ndata.prefetch on {number} rounds: {after:.0f} images/s, without {before:.0f}: {after / before:.2f}x")
        print(f"seconds of the last {EVERY} steps: {last['seconds']}; ahead: {last['ahead']}; without: {rows(runs[False])[-1]['seconds']}")
