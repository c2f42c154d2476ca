"""`megakd plan --sweep 8,64,512,4096`: what becomes of a job's memory, traffic and time as it gets more GPUs.

Closed forms of the plan at each count; no rank is simulated. A step is

    teacher + student + losses + update + what of the communication nothing hides + what of the loader's work nothing hides

Communication of W ranks on M nodes is that of NCCL's own cost model (https://github.com/NVIDIA/nccl, src/graph/tuning.cc): bytes over
the bandwidth, and for each collective a start and its hops, W - M inside nodes and M - 1 between them; an all-reduce goes around twice, or
up and down a tree of log2 M nodes where that is less. NCCL lays a ring through each network card of a node, so a rank sends at the speed
of its link in the node, or of all the node's cards together where that is less. (The plan without --sweep takes a single ring.)

Gradients are reduced beside the backward where the JSON says overlap_comm, ZeRO-3 gathers and scatters beside student or teacher, a loss's
ring beside its products; updated weights of ZeRO-1 and 2 and the losses' gathers are waited for.
Legend: W ranks, M nodes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from megakd.planning import plan as planner
from megakd.planning import rates
from megakd.planning.cluster import Cluster
from megakd.planning.modes import PlannedJob, Row
from megakd.planning.plan import MemoryPlan
from megakd.planning.scaling import Scaling
from megakd.recipe import Recipe
from megakd.runtime.wire import Wire

MICRO = 1e-6


@dataclass(frozen=True)
class Step:
    """Seconds of a step in one mode. hidden: communication beside computing; waited: the rest of it; data: waiting for the loader."""

    teacher: float
    student: float
    loss: float
    update: float
    hidden: float
    waited: float
    data: float

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.loss + self.update + self.waited + self.data


@dataclass(frozen=True)
class Point:
    """One number of GPUs. steps: by mode. best: the fastest mode that fits and needs nothing prepared, where there is one."""

    plan: MemoryPlan
    steps: dict[str, Step]
    best: str | None

    @property
    def gpus(self) -> int:
        return self.plan.cluster.gpus

    @property
    def samples(self) -> int:
        return self.plan.job.pairs or self.plan.job.questions

    def row(self, mode: str) -> Row:
        return next(row for row in self.plan.rows if row.mode.name == mode)

    def rate(self, mode: str) -> float:
        """Pairs a second, or questions where there are no pairs."""
        return self.samples / self.steps[mode].total


@dataclass(frozen=True)
class Sweep:
    points: list[Point]
    assumed: Scaling
    gpu: rates.Gpu

    def efficiency(self, point: Point, mode: str) -> float:
        """Samples a second and GPU, as a share of those at the smallest count in the same mode."""
        first = self.points[0]
        return point.rate(mode) / point.gpus / (first.rate(mode) / first.gpus)

    def to_json(self) -> dict[str, Any]:
        points = []
        for point in self.points:
            modes = [
                {
                    "mode": name, "step": {**asdict(step), "total": step.total}, "per_second": point.rate(name),
                    "efficiency": self.efficiency(point, name),
                    "sent": {whose: asdict(wire) for whose, wire in point.row(name).sent.items()},
                    "parts": point.row(name).parts, "bytes": point.row(name).bytes,
                    "fits": point.row(name).fits(point.plan.cluster.usable),
                }
                for name, step in point.steps.items()
            ]  # fmt: skip
            job = point.plan.job
            points.append({"gpus": point.gpus, "batch": job.pairs, "questions": job.questions, "micro_batches": job.rounds,
                           "asked": point.plan.asked, "best": point.best, "modes": modes})  # fmt: skip
        return {"assumptions": {**asdict(self.assumed), "gpu": asdict(self.gpu)}, "points": points}


def sweep(recipe: Recipe, name: str, config: str | None, cluster: Cluster, assumed: Scaling) -> Sweep:
    """The plan of the recipe at each of the counts. Raises ValueError as `planner.plan`, and where a rank would be left without a pair."""
    counts = assumed.check(cluster)
    kind = rates.gpu(cluster.kind)
    gpu = rates.Gpu(
        kind.name, kind.flops, kind.memory, (assumed.node_link or kind.node / rates.GIGA) * rates.GIGA,
        (assumed.network or kind.network / rates.GIGA) * rates.GIGA,
    )  # fmt: skip
    scaled = {count: _scaled(recipe, assumed.scaling, counts[0], count) for count in counts}
    points = []
    for count, recipe_there in scaled.items():
        plan = planner.plan(recipe_there, name, config, Cluster(count, cluster.memory, cluster.per_node, cluster.kind))
        points.append(_point(plan, assumed, gpu, recipe.data.workers))
    return Sweep(points, assumed, gpu)


def _scaled(recipe: Recipe, scaling: str, smallest: int, count: int) -> Recipe:
    """At so many GPUs."""
    answers, batches = recipe.answers, {"optim.batch": recipe.optim.batch}
    if answers is not None and answers.batch is not None:
        batches["answers.batch"] = answers.batch
    for key, batch in batches.items():
        if scaling == "weak" and batch % smallest:
            raise ValueError(f"{key} = {batch}: does not divide over the smallest count of --sweep, {smallest} GPUs")
        if scaling == "strong" and batch < count:
            grown = "" if batch % smallest else ", or --scaling weak"
            raise ValueError(f"--sweep: {key} = {batch} leaves less than one to each of {count} GPUs; use fewer, a larger {key}{grown}")
    if scaling == "strong":
        return recipe
    optim = recipe.optim.model_copy(update={"batch": recipe.optim.batch // smallest * count})
    if answers is not None and answers.batch is not None:
        answers = answers.model_copy(update={"batch": answers.batch // smallest * count})
    return recipe.model_copy(update={"optim": optim, "answers": answers})


def _point(plan: MemoryPlan, assumed: Scaling, gpu: rates.Gpu, workers: int) -> Point:
    steps = {row.mode.name: _step(plan.job, row, assumed, gpu, workers) for row in plan.rows}
    fitting = [row.mode for row in plan.rows if row.fits(plan.cluster.usable)]
    ready = [mode.name for mode in fitting if not mode.prepared] or [mode.name for mode in fitting]
    return Point(plan, steps, min(ready, key=lambda mode: round(steps[mode].total, 4), default=None))


def _step(job: PlannedJob, row: Row, assumed: Scaling, gpu: rates.Gpu, workers: int) -> Step:
    zero = job.student_zero
    speedup = rates.INT8_SPEEDUP if row.mode.int8 else 1.0
    teacher = row.flops["teacher"] / (gpu.flops * assumed.forward_share * speedup) + row.fetched / rates.HOST_LINK
    student = row.flops["student"] / (gpu.flops * assumed.training_share)
    loss = row.flops["loss"] / (gpu.flops * assumed.loss_share)

    def among(wire: Wire, ranks: int) -> float:
        return seconds(wire, ranks, job.per_node, gpu, assumed)

    own = row.sent["student"]
    far = Wire(*(getattr(own, one.name) - getattr(row.near, one.name) for one in fields(Wire)))
    if zero.stage == 3:
        beside, after = among(far, job.ranks) + among(row.near, zero.group), 0.0
    else:
        reducing = among(Wire(all_reduce=own.all_reduce, reductions=own.reductions), job.ranks)
        gathering = among(Wire(all_gather=own.all_gather, calls=own.calls), job.ranks)
        beside, after = (reducing, gathering) if zero.stage and zero.overlap else (0.0, reducing + gathering)
    around = row.sent["loss"].sent
    ring = among(Wire(sent=around, calls=1), job.ranks) if around else 0.0
    losses = among(row.sent["loss"], job.ranks) - ring
    fetching = among(row.sent["teacher"], job.ranks)
    hidden = sum(min(assumed.overlap * sent, busy) for sent, busy in ((beside, student), (fetching, teacher), (ring, loss)))
    waited = beside + after + ring + losses + fetching - hidden
    busy = teacher + student + loss + row.seconds.update + waited
    prepared = assumed.images * max(1, workers)
    loading = (job.pairs + job.questions) / job.ranks / prepared if prepared else 0.0
    return Step(teacher, student, loss, row.seconds.update, hidden, waited, max(0.0, loading - busy))


def seconds(wire: Wire, ranks: int, per_node: int, gpu: rates.Gpu, assumed: Scaling) -> float:
    """Of collectives one after the other."""
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / per_node)
    bandwidth = assumed.link_share * (gpu.node if nodes == 1 else min(gpu.node, per_node * gpu.network))
    around = (ranks - nodes) * assumed.hop_us + (nodes - 1) * assumed.network_hop_us
    tree = 2 * ((min(ranks, per_node) - 1) * assumed.hop_us + math.log2(nodes) * assumed.network_hop_us)
    waits = wire.calls * (assumed.start_us + around) + wire.reductions * (assumed.start_us + min(2 * around, tree))
    return wire.bytes / bandwidth + MICRO * waits
