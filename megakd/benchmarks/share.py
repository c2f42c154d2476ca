"""What share of a large step is outside the towers: 2,048 pairs on two ranks, the teacher from a store, the real training program.

1. A store of embeddings as wide as ViT-B-32's is made once, by a teacher whose own towers are tiny: its rows cost what any teacher's do.
2. Each round starts two ranks on gloo, lets them make their timed steps and kills them.
3. The trainer's own stopwatch says where rank 0 spent the step: inside the student, or in data, loss, reduce, update and other.

A rank's pairs go through the student in micro-batches, as they must where activations do not fit. The loss sees all pairs at once, so each
micro-batch is encoded twice (GradCache); without that the student would cost three quarters, by which the share is told as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from megakd.benchmarks.common import comparison, environment, material, side_by_side
from megakd.benchmarks.common.children import Child, ended_by_sigterm
from megakd.benchmarks.common.logs import TOWERS
from megakd.benchmarks.common.side_by_side import PAIR_SECONDS, START_SECONDS
from megakd.runtime.console import plain
from megakd.runtime.run_folder import METRICS, read_metrics

RANKS, LIMIT = 2, 0.03
WARM_UP = 1
# The image tower of CLIP-KD's ViT-T with 32-pixel patches, and a text tower as wide: a step of 1,024 pairs a rank ends on a core.
SMALL: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 192, "layers": 12, "head_width": 64},
    "text_cfg": {"context_length": 77, "width": 192, "heads": 3, "layers": 12},
}
STORED: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 77, "width": 32, "heads": 2, "layers": 1},
}
PARTS = ("data", "teacher", "student", "loss", "reduce", "update", "other")
Row = dict[str, Any]


def run(
    rounds: int,
    batch: int,
    steps: int,
    micro_batch: int,
    workers: int = 1,
    threads: int = 1,
    student: str | None = None,
    file: Path | None = None,
) -> None:
    """Measure and print: the parts of a step, the share of each round, the verdict, and a line of JSON.

    batch: pairs of both ranks; steps: timed steps a round; student: an open_clip name in the place of SMALL.
    Raises ValueError for a batch that does not divide, and when a run fails, with its last lines.
    """
    if batch % (RANKS * micro_batch):
        raise ValueError(f"--batch {batch}: a multiple of {RANKS} ranks x --micro_batch {micro_batch}")
    chosen: dict[str, Any] = {"architecture": SMALL} if student is None else {"model": student}
    found: list[list[Row]] = []
    loading: list[float] = []
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="megakd-share-") as name:
        folder, shards = Path(name), material.shards(environment.cache(), material.shards_of(batch))  # one epoch is one step
        if batch > shards.samples:
            raise ValueError(f"--batch {batch}: the benchmark's shards hold {shards.samples} pairs; ask for less")
        recipe = stored_recipe(shards.pattern, chosen, folder / "store", batch, workers)
        side_by_side.embed(recipe, folder / "store", folder, shards.samples, threads)
        config = {"train_micro_batch_size_per_gpu": micro_batch}
        for number in range(rounds):
            with side_by_side.training(recipe, folder / f"round-{number}", threads, ranks=RANKS, config=config) as child:
                rows, busy = _measured(child, folder / f"round-{number}" / "run", steps, batch)
            found.append(rows)
            loading.append(busy / RANKS - median(processor(row) for row in rows))
            print(f"round {number + 1}/{rounds}: {share([rows], 'seconds'):.2%} outside the towers", flush=True)
    _tell(
        found, loading, student or "SMALL", {"batch": batch, "steps": steps, "micro_batch": micro_batch, "workers": workers}, threads, file
    )


def stored_recipe(pattern: str, student: dict[str, Any], store: Path, batch: int, workers: int) -> dict[str, Any]:
    """Contrastive and similarity loss on a stored teacher."""
    teacher = {"architecture": STORED, "pretrained": "random", "store": str(store)}
    return side_by_side.recipe("bench-share", pattern, student, teacher, batch, workers)


def _measured(child: Child, run: Path, steps: int, batch: int) -> tuple[list[Row], float]:
    """The timed rows, and the processor seconds of all processes for a step of them."""
    limit = START_SECONDS + (WARM_UP + steps) * PAIR_SECONDS * batch

    def at_least(number: int) -> tuple[list[Row], float] | None:
        if not (run / METRICS).exists():
            return None
        rows = [row for row in read_metrics(run) if "processor_seconds" in row]
        return (rows, child.processor_seconds()) if len(rows) >= number else None

    before, start = child.wait_for(lambda: at_least(WARM_UP), limit)
    after, end = child.wait_for(lambda: at_least(max(WARM_UP + steps, len(before) + 1)), limit)
    return after[WARM_UP : WARM_UP + steps], (end - start) / (len(after) - len(before))


def processor(row: Row) -> float:
    """Of rank 0's process in a step."""
    return float(sum(row["processor_seconds"].values()))


def share(rounds: Sequence[Sequence[Row]], kind: str, *, student: float = 1.0) -> float:
    """Median over the steps of all rounds of the fraction that is no tower's. kind: `seconds` or `processor_seconds` of the rows.

    student: how much of its time counts, as if the rest had not been spent.
    """

    def of(row: Row) -> float:
        towers = sum(row[kind].get(name, 0.0) * (student if name == "student" else 1.0) for name in TOWERS)
        rest = sum(seconds for name, seconds in row[kind].items() if name not in TOWERS)
        return float(rest / (rest + towers))

    return median(of(row) for rows in rounds for row in rows)


def _tell(rounds: list[list[Row]], loading: list[float], student: str, settings: dict[str, Any], threads: int, file: Path | None) -> None:
    console, rows = plain(), [row for each in rounds for row in each]
    table = Table("rank 0, median s of a step", *PARTS, "outside the towers", title=f"bench share, {student}", title_justify="left")
    kinds = {"wall": "seconds", "processor": "processor_seconds"}
    for name, kind in kinds.items():
        middle = (median(row[kind].get(part, 0.0) for row in rows) for part in PARTS)
        table.add_row(name, *(f"{seconds:.3f}" for seconds in middle), f"{share(rounds, kind):.2%}")
    console.print(table)
    single = {name: [share([each], kind) for each in rounds] for name, kind in kinds.items()}
    once = {name: share(rounds, kind, student=0.75) for name, kind in kinds.items()}
    verdict = "reached" if max(single["wall"]) <= LIMIT else "NOT reached"
    for note in (
        *(f"{name} by round: {', '.join(f'{one:.2%}' for one in shares)}" for name, shares in single.items()),
        f"with one forward instead of GradCache's two: wall {once['wall']:.2%}, processor {once['processor']:.2%}",
        f"the loader's workers took {median(loading):.2f} s of processor time a step and rank, beside the step but for `data`",
        f"<= {LIMIT:.0%} of the wall time in every round: {verdict}",
    ):
        console.print(f"- {note}", markup=False)
    where = comparison.conditions({"torch": torch.__version__}, threads)
    told = {"share": {name: share(rounds, kind) for name, kind in kinds.items()}, "by_round": single, "one_forward": once}
    more = {"reached": verdict == "reached", "loading_seconds": loading, "ranks": RANKS, "student": student, "settings": settings}
    steps = [{kind: row[kind] for kind in kinds.values()} for row in rows]
    comparison.record({"benchmark": "bench share", **told, **more, "rows": steps, **where}, file)
