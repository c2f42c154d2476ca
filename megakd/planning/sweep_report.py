"""A sweep over numbers of GPUs, as tables for people."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from rich.table import Table

from megakd.planning.cluster import GB
from megakd.planning.report import MEMORY, OF_TEACHER, WIDTH
from megakd.planning.scaling import Scaling
from megakd.planning.sweep import Point, Sweep
from megakd.runtime.console import plain

Cell = Callable[[Point, str], str]
LARGEST_TRAINED = 163_840  # pairs a step: OpenCLIP's ViT-bigG-14, laion2b_s39b_b160k


def show(sweep: Sweep, file: Path | None = None) -> None:
    """Print memory, traffic and time at each count, for the recipe's own mode of the teacher and the best one; to `file`, as JSON."""
    console = plain(WIDTH)
    for line in _head(sweep):
        console.print(line, markup=False)
    for table in (_memory(sweep), _traffic(sweep), _time(sweep)):
        console.print(table)
    for line in _notes(sweep):
        console.print(line, markup=False)
    if file is not None:
        file.write_text(json.dumps(sweep.to_json(), indent=2) + "\n", encoding="utf-8")


def _head(sweep: Sweep) -> list[str]:
    plan, assumed, gpu = sweep.points[0].plan, sweep.assumed, sweep.gpu
    job = plan.job
    teachers = ", ".join(teacher.name for teacher in job.teachers) or "none"
    scaled = (
        "strong scaling, the same batch at every count" if assumed.scaling == "strong" else "weak scaling, the batch grows with the GPUs"
    )
    return [
        f"{job.student.name} from {teachers}, ZeRO {job.student_zero.stage}; {scaled} (--scaling)",
        f"assumed: {gpu.name}, {gpu.flops / 1e12:.0f} TFLOP/s in bf16, of it {assumed.forward_share:.0%} in the teacher, "
        f"{assumed.training_share:.0%} in the student, {assumed.loss_share:.0%} in losses;",
        f"  nodes of {job.per_node}: a GPU sends {gpu.node / GB:g} GB/s in its node, {gpu.network / GB:g} GB/s by a network card of its "
        f"own, collectives {assumed.link_share:.0%} of that;",
        f"  a collective starts in {assumed.start_us:g} us, a hop takes {assumed.hop_us:g} us in a node and {assumed.network_hop_us:g} us "
        f"between nodes; {assumed.overlap:.0%} of what can run beside computing does;",
        f"  a loader process prepares {assumed.images:g} images/s" if assumed.images else "  the loader is never waited for",
    ]


def _shown(point: Point) -> list[str]:
    """The recipe's own mode, and the best one where that is another."""
    return list(dict.fromkeys(mode for mode in (point.plan.asked, point.best) if mode is not None))


def _table(sweep: Sweep, title: str, columns: dict[str, Cell]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("GPUs", "batch"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("teacher", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="left" if name in ("in", "fits") else "right", no_wrap=True)
    for point in sweep.points:
        for mode in _shown(point):
            marks = (" *" if mode == point.plan.asked else "") + (" best" if mode == point.best else "")
            table.add_row(f"{point.gpus:,}", f"{point.samples:,}", mode + marks, *(cell(point, mode) for cell in columns.values()))
    return table


def _memory(sweep: Sweep) -> Table:
    def part(*names: str) -> Cell:
        return lambda point, mode: f"{sum(point.row(mode).parts[name] for name in names) / GB:.2f}"

    own = list(MEMORY)[OF_TEACHER:]
    states = ("student weights", "gradients", "optimizer", "student gathered")
    columns: dict[str, Cell] = {
        "teacher": part(*list(MEMORY)[:OF_TEACHER]),
        "student states": part(*(name for name in own if name in states)),
        "activations": part("student activations"),
        "losses": part("loss"),
        "batch": part("batch"),
        "peak": lambda point, mode: f"{point.row(mode).bytes / GB:.2f}",
        "in": lambda point, mode: max(places := point.row(mode).places, key=lambda place: places[place]),
        "fits": lambda point, mode: "yes" if point.row(mode).fits(point.plan.cluster.usable) else "no",
    }
    return _table(sweep, "memory a GPU, GB", {f"{name} GB" if name == "batch" else name: cell for name, cell in columns.items()})


def _traffic(sweep: Sweep) -> Table:
    def kind(name: str) -> Cell:
        return lambda point, mode: f"{sum(getattr(wire, name) for wire in point.row(mode).sent.values()) / GB:.2f}"

    def whose(name: str) -> Cell:
        return lambda point, mode: f"{point.row(mode).sent[name].bytes / GB:.2f}"

    kinds = {"gathered": "all_gather", "scattered": "reduce_scatter", "reduced": "all_reduce", "around": "sent"}
    columns = {title: kind(name) for title, name in kinds.items()} | {f"of {name}": whose(name) for name in ("student", "teacher", "loss")}
    columns["collectives"] = lambda point, mode: str(sum(wire.calls + wire.reductions for wire in point.row(mode).sent.values()))
    return _table(sweep, "sent by a GPU in a step, GB", columns)


def _time(sweep: Sweep) -> Table:
    def part(name: str) -> Cell:
        return lambda point, mode: f"{getattr(point.steps[mode], name):.3f}"

    columns = {name: part(name) for name in ("teacher", "student", "loss", "update", "hidden", "waited", "data", "total")}
    columns["images/s"] = lambda point, mode: f"{point.rate(mode):,.0f}"
    columns["efficiency"] = lambda point, mode: f"{sweep.efficiency(point, mode):.0%}"
    named = {f"{name} s" if name in ("teacher", "total") else name: cell for name, cell in columns.items()}
    return _table(sweep, "a step, s; hidden: communication beside computing, in no sum; waited: the rest of it", named)


def _notes(sweep: Sweep) -> list[str]:
    first, last = sweep.points[0], sweep.points[-1]
    asked, pairs = last.plan.asked, last.plan.job.pairs
    loss = last.plan.job.loss
    mine = last.steps[asked].loss / last.steps[asked].total
    lines = [
        f"* the recipe's own mode; best: the fastest that fits and needs nothing prepared. efficiency: images/s a GPU against {first.gpus} "
        f"GPUs in the same mode",
    ]
    if pairs:
        lines.append(
            f"losses at {pairs:,} pairs on {last.gpus:,} GPUs: {loss.flops / 1e12:.1f} TFLOP a GPU, {mine:.0%} of the step, "
            f"{loss.memory / GB:.1f} GB; the whole N x N in float32 would take {4 * pairs**2 / GB:,.0f} GB"
        )
    lines += [f"on {point.gpus:,} GPUs {point.plan.why}" for point in sweep.points if point.best is None]
    if pairs > LARGEST_TRAINED:
        lines.append(
            f"on paper alone: nobody has published a run with {pairs:,} pairs a step; the largest open one has {LARGEST_TRAINED:,}"
        )
    flags = ", ".join(one.metadata.get("flag", f"--{one.name}") for one in fields(Scaling) if one.name not in ("sweep", "scaling"))
    return [*lines, f"times are ESTIMATES, checked against published runs in planning/README.md; to assume otherwise: --gpu, {flags}"]
