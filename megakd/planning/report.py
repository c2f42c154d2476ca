"""A plan as a table for people: what is the same in every mode once, what differs in columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from megakd.planning.cluster import GB
from megakd.planning.modes import Row
from megakd.planning.plan import MemoryPlan
from megakd.runtime.console import plain

Cell = Callable[[Row], str]

# Headings of a column or of a line, the teacher's own first.
MEMORY = {
    "teacher weights": "weights", "teacher gathered": "blocks", "teacher activations": "activations",
    "student weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "student activations": "activations",
    "student gathered": "gathered", "loss": "losses", "batch": "batch",
}  # fmt: skip
OF_TEACHER = 3
# Narrower than the tables, rich would cut their numbers.
WIDTH = 128


def show(plan: MemoryPlan, file: Path | None = None) -> None:
    """Print the job, its memory, work and time in every mode, the recommendation, and what the numbers rest on; to `file`, as JSON."""
    console = plain(WIDTH)
    own = next(row for row in plan.rows if row.mode.name == plan.asked)
    for line in (*_job(plan), *plan.mixed, *_student(own)):
        console.print(line, markup=False)
    console.print(_memory(plan))
    console.print(_work(plan))
    if plan.stored is not None:
        console.print(f"a store of a million pairs by `megakd embed`, for each of its --views: {plan.stored}", markup=False)
    if plan.beside is not None:
        console.print(plan.beside, markup=False)
    for line in (
        f"* the recipe's own mode; does it fit (GB): {_verdict(own, plan.cluster.usable)}",
        f"recommended: {plan.recommended} - {plan.why}" if plan.recommended else plan.why,
        "memory is counted on meta and was checked against runs; times are ESTIMATES, the maker's peaks times assumed shares of them",
        "(in the --json), as if no communication were hidden behind computation",
    ):
        console.print(line, markup=False)
    if file is not None:
        file.write_text(json.dumps(plan.to_json(), indent=2) + "\n", encoding="utf-8")


def _job(plan: MemoryPlan) -> list[str]:
    job, cluster = plan.job, plan.cluster
    zero = job.student_zero
    offload = " with offload" if zero.offload_optimizer or zero.offload_weights else ""
    named = [f"{one.name}, {_billions(one.image.wide.numel + (one.text.wide.numel if one.text else 0))}" for one in job.teachers]
    if job.answer_teacher is not None:
        named.append(f"of answers {job.answer_teacher.name}, {_billions(job.answer_teacher.numel)}")
    teachers = "; ".join(named) or "none"
    frozen = f" trained and {_billions(sum(job.student.frozen))} not" if job.student.frozen else ""
    frozen += ", an average of each weight" if job.student.averaged else ""
    batch = [f"batch {job.pairs} = {job.ranks} ranks x {job.rounds} x {job.local // job.rounds}"] if job.pairs else []
    if job.questions:
        batch.append(f"{job.questions} questions of answers.max_length tokens, over {job.ranks} ranks x {job.rounds}")
    losses = ", ".join(f"{name} by {backend}" for name, backend in job.backends.items())
    return [
        f"{cluster.gpus} x {cluster.kind} of {cluster.memory:g} GB ({cluster.usable / GB:.1f} usable), {cluster.per_node} a node; "
        f"{'; '.join(batch)}",
        f"student: {job.student.name}, {_billions(job.student.numel)}{frozen}, ZeRO {zero.stage}{offload}, "
        f"{'bf16' if zero.element == 2 else 'fp32'}; teacher: {teachers}",
        f"losses: {losses or 'none over the similarity matrix'}",
    ]


def _student(row: Row) -> list[str]:
    """What no mode of the teacher changes."""
    parts = [f"{title} {row.parts[name] / GB:.2f}" for name, title in list(MEMORY.items())[OF_TEACHER:]]
    s = row.seconds
    return [
        f"student a GPU, GB: {', '.join(parts)}",
        f"student a step: {row.flops['student'] / 1e12:.2f} TFLOP in {s.student:.3f} s, update {s.update:.3f} s, "
        f"{row.wire['student'] / GB:.2f} GB sent; losses {row.flops['loss'] / 1e12:.2f} TFLOP in {s.loss:.3f} s, "
        f"{row.wire['loss'] / GB:.2f} GB sent",
    ]


def _memory(plan: MemoryPlan) -> Table:
    def at(row: Row) -> str:
        return max(row.places, key=lambda place: row.places[place])

    columns: dict[str, Cell] = {title: _part(name) for name, title in list(MEMORY.items())[:OF_TEACHER]}
    columns |= {"peak": lambda row: f"{row.bytes / GB:.2f}", "in": at, "on the host": lambda row: f"{row.host / GB:.1f}"}
    return _table("teacher a GPU, GB; peak of the whole step", plan, columns | {"fits": lambda row: _verdict(row, plan.cluster.usable)})


def _work(plan: MemoryPlan) -> Table:
    columns: dict[str, Cell] = {
        "TFLOP": lambda row: f"{row.flops['teacher'] / 1e12:.1f}",
        "GB sent": lambda row: f"{row.wire['teacher'] / GB:.2f}",
        "forward s": lambda row: f"{row.seconds.teacher:.3f}",
        "all communication s": lambda row: f"{row.seconds.communication:.3f}",
        "whole step s": lambda row: f"{row.seconds.total:.3f}",
        "pairs/s" if plan.job.pairs else "questions/s": lambda row: f"{(plan.job.pairs or plan.job.questions) / row.seconds.total:.0f}",
    }
    return _table("teacher a step and GPU; whole step (estimates)", plan, columns)


def _table(title: str, plan: MemoryPlan, columns: dict[str, Cell]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("teacher mode", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="left" if name in ("in", "fits") else "right", no_wrap=True)
    for row in plan.rows:
        own = " *" if row.mode.name == plan.asked else ""
        table.add_row(row.mode.name + own, *(cell(row) for cell in columns.values()))
    return table


def _part(name: str) -> Cell:
    return lambda row: f"{row.parts[name] / GB:.2f}"


def _verdict(row: Row, usable: float) -> str:
    spare = (usable - row.bytes) / GB
    return f"yes, {spare:.1f} spare" if spare >= 0 else f"no, {-spare:.1f} over"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
