"""The step with `data.prefetch`, without, and with a teacher in 8 bit, on a CUDA device: in turns, in one process, alone on the device."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import pytest

from support.runs import losses, ran, rows

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]
SECONDS = 15.0  # after which no further round begins; `make gpu` has 48 for all of it
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


SIDES = {
    "plain": ("data.prefetch=false",),
    "prefetch": ("data.prefetch=true",),
    "int8": ("data.prefetch=false", "teacher.mode=replicated_int8"),
}


def test_the_step_is_timed_with_and_without_a_batch_ahead_and_with_a_teacher_in_8_bit(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A replica in bf16 that costs about as much as the student. What is prefetched changes losses by a device's order of sums alone."""
    recipe = tmp_path / "timed.toml"
    recipe.write_text(RECIPE.format(world=world, steps=STEPS, every=EVERY), encoding="utf-8")
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    start, number = time.perf_counter(), 0
    while number < 1 or time.perf_counter() - start < SECONDS:
        runs = {name: ran(recipe, tmp_path / f"{name}-{number}", *sets) for name, sets in SIDES.items()}
        for name, run in runs.items():
            rates[name] += [row["images_per_second"] for row in rows(run)[1:]]
        assert losses(runs["prefetch"]) == pytest.approx(losses(runs["plain"]), rel=0.02)
        number += 1
    assert sum(row["ahead"]["batches"] for row in rows(runs["prefetch"])) == STEPS - 1
    medians = {name: median(found) for name, found in rates.items()}
    with capsys.disabled():
        print(f"\nsteps of {number} rounds, images/s, and against a plain step with a teacher in bf16:")
        for name, run in runs.items():
            last, ratio = rows(run)[-1], medians[name] / medians["plain"]
            ahead = f"; ahead: {last['ahead']}" if "ahead" in last else ""
            print(f"  {name}: {medians[name]:.0f}, {ratio:.2f}x; seconds of {EVERY} steps: {last['seconds']}{ahead}")
