"""The ways to hold a teacher, and what each makes of a job: memory by part and by place in the step, traffic, FLOPs, time.

Legend: W ranks, B pairs of a micro-batch. All sizes are bytes of one rank, all traffic bytes that one rank sends in a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megakd.objectives.cost import LossCost
from megakd.planning import rates, zero
from megakd.planning.models import BACKWARD_FLOPS, StudentCost, TeacherCost
from megakd.planning.vlm import AnswerTeacherCost
from megakd.recipe.placements import PLACEMENTS
from megakd.runtime.wire import Wire
from megakd.teachers.base import TeacherMemory, TeacherShape
from megakd.teachers.build import class_of


@dataclass(frozen=True)
class Mode:
    """weights: as the tables name them. placement: None where all embeddings come from a store, or there is no teacher.

    text: whether the text tower is there, or its embeddings come from a store.
    """

    weights: str
    placement: str | None = None
    int8: bool = False
    offload: bool = False
    text: bool = False

    @property
    def name(self) -> str:
        if self.placement is None:
            return self.weights
        return self.weights + (" + offload" if self.offload else "") + ("" if self.text else ", text from store")

    @property
    def prepared(self) -> bool:
        """Whether `megakd embed` must have run before."""
        return not self.text and self.weights != NONE


STORE, NONE = "store", "no teacher"
_NO_ANSWER_TEACHER = AnswerTeacherCost("", 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class PlannedJob:
    """What of a run is the same in every mode. student_zero and teacher_zero: how DeepSpeed is set for each.

    pairs, questions: of a step, over all ranks; 0 where there are none. rounds: micro-batches of a step. answer_teacher: of a decoder.
    kept: bytes of what losses read of each teacher's blocks, for the pairs of a rank. prefetch: as in `data.prefetch`.
    """

    student: StudentCost
    teachers: tuple[TeacherCost, ...]
    loss: LossCost
    backends: dict[str, str]
    student_zero: zero.Settings
    teacher_zero: zero.Settings
    pairs: int
    ranks: int
    questions: int
    rounds: int
    gpu: rates.Gpu
    per_node: int
    answer_teacher: AnswerTeacherCost | None = None
    kept: tuple[int, ...] = ()
    prefetch: bool = False

    @property
    def local(self) -> int:
        return self.pairs // self.ranks


@dataclass(frozen=True)
class Row:
    """One mode. parts: bytes by what they are for, at their own largest; places: bytes held at each place in the step.

    sent: by whose it is. near: of the student's, what stays in a group of hpZ. flops: of one rank and step. host: bytes of CPU memory that
    offloading takes. fetched: of them, what the teacher's forwards bring to the device.
    """

    mode: Mode
    parts: dict[str, int]
    places: dict[str, int]
    host: int
    sent: dict[str, Wire]
    near: Wire
    fetched: int
    flops: dict[str, float]
    seconds: rates.Seconds

    @property
    def wire(self) -> dict[str, int]:
        """Bytes that one rank sends, of all kinds."""
        return {whose: wire.bytes for whose, wire in self.sent.items()}

    @property
    def bytes(self) -> int:
        return max(self.places.values())

    def fits(self, usable: float) -> bool:
        return self.bytes <= usable


def modes(job: PlannedJob) -> list[Mode]:
    """Simplest first. DeepSpeed offloads what it partitions, so replicas have no offload."""
    if not job.teachers:
        return [Mode(NONE)]
    wide = "fp32" if job.teachers[0].element == 4 else "bf16"
    whole = [
        Mode(f"{name} {'int8' if int8 else wide}", name, int8, offload, text=True)
        for name, placement in PLACEMENTS.items()
        for int8 in ((False, True) if placement.int8 else (False,))
        for offload in ((False, True) if "offload" in placement.options else (False,))
    ]
    if any(cost.text is None for cost in job.teachers):
        return whole  # a store holds pairs
    return [*whole, *(replace(mode, text=False) for mode in whole), Mode(STORE)]


@dataclass(frozen=True)
class _Held(TeacherMemory):
    """A teacher in a mode. input: as in `TeacherCost`; flops: of a pair's forward."""

    input: int = 0
    flops: int = 0


def row(job: PlannedJob, mode: Mode) -> Row:
    teacher = _together([_teacher(job, mode, mode.placement, cost) for cost in job.teachers if mode.placement])
    student = job.student
    of = zero.held(student.sizes, job.ranks, job.student_zero, student.frozen, averages=student.averaged)
    batch = student.raw + sum(cost.raw for cost in job.teachers)
    asked = _NO_ANSWER_TEACHER if job.answer_teacher is None else job.answer_teacher
    batch += asked.raw
    standing = of.weights + of.optimizer + of.standing + teacher.weights + asked.weights + batch
    read = asked.logits - asked.logits // job.rounds + asked.activations  # the last micro-batch, beside the logits of the others
    # Patch tokens of one micro-batch after the other, then all of a teacher's joined; they are held to the end of the step.
    kept, most = sum(job.kept), max(job.kept, default=0)
    joined = kept + (most if mode.placement else 0)
    reading = max(teacher.activations + teacher.gathered + kept - most // job.rounds, joined)
    at_reading = max(teacher.input + reading, kept + read)
    ahead = 0
    if job.prefetch:  # beside any place in the step: the next batch, and the teachers at it that are not asked in their own step
        in_step = mode.placement is not None and job.ranks > 1 and class_of(mode.placement).gathers
        said = kept + asked.logits + sum(2 * job.local * cost.width * cost.element for cost in job.teachers)
        ahead = batch + (read if in_step else max(at_reading, said))
    # Only losses over pairs need all micro-batches at once; those of answers add up.
    accumulated = job.rounds > 1 and job.pairs > 0
    backward = student.backward + (0 if of.keeps else of.gradients)
    # Several micro-batches: the losses see cached embeddings alone, and activations are made again afterwards.
    at_loss = 0 if accumulated else student.saved
    inputs = student.input if job.rounds > 1 else 0
    # From the second micro-batch on there are gradients already.
    forward = student.forward + (of.gradients if of.keeps and job.rounds > 1 else 0)
    after = standing + asked.logits + kept
    # What heads give of patch tokens, of all micro-batches: as it comes, joined, and the gradient at it.
    features = job.student.features * job.rounds
    cached = 3 * features if accumulated else 0
    places = {
        "teacher": standing + at_reading,
        "student forward": after + ahead + cached + of.gathered + inputs + max(forward, student.input),
        "loss": after + ahead + of.gathered + inputs + at_loss + job.loss.memory + (2 * features if accumulated else 0),
        "backward": after + ahead + cached + of.gathered + inputs + max(forward, backward, of.gradients + of.reducing),
        "update": after + ahead + max(cached, features) + of.updating,
    }
    parts = {
        "student weights": of.weights, "gradients": max(of.gradients, of.standing), "optimizer": of.optimizer,
        "student activations": max(student.forward, student.saved), "student gathered": of.gathered,
        "teacher weights": teacher.weights + asked.weights, "teacher gathered": teacher.gathered,
        "teacher activations": max(teacher.activations + teacher.input, read),
        "loss": job.loss.memory + kept + cached, "batch": batch + ahead,
    }  # fmt: skip
    forwards, backwards = (2 * job.rounds if accumulated else job.rounds), job.rounds
    far, near = zero.traffic(student.sizes, job.ranks, job.student_zero, forwards, backwards, student.frozen, traced=not accumulated)
    sent = {"student": far + near, "teacher": teacher.wire.times(job.rounds), "loss": job.loss.wire}
    passes = 1 + student.pair_backward + student.recomputed * student.pair_backward / BACKWARD_FLOPS + accumulated
    asked_passes = 1 + student.asked_backward + accumulated
    flops = {
        "teacher": float(teacher.flops * job.local) + asked.flops * job.questions / job.ranks,
        "student": float(student.flops * passes * job.local + student.asked_flops * asked_passes * job.questions / job.ranks),
        "loss": float(job.loss.flops),
    }
    seconds = _seconds(job, mode, flops, sum(one.bytes for one in sent.values()), near.bytes, teacher)
    return Row(mode, parts, places, of.host + teacher.host, sent, near, teacher.host * job.rounds, flops, seconds)


def _together(held: list[_Held]) -> _Held:
    """Teachers lie in memory side by side and run one after the other."""
    if not held:
        return _Held()
    busiest = max(held, key=lambda one: one.gathered + one.activations + one.input)
    added = {name: sum(getattr(one, name) for one in held) for name in ("weights", "host", "flops")}
    return replace(busiest, **added, wire=sum((one.wire for one in held), Wire()))


def _teacher(job: PlannedJob, mode: Mode, placement: str, cost: TeacherCost) -> _Held:
    towers = [cost.image, *([cost.text] if mode.text and cost.text is not None else [])]
    forms, of = [tower.int8 if mode.int8 else tower.wide for tower in towers], job.teacher_zero
    shape = TeacherShape(forms, job.ranks, 1 if mode.int8 else cost.element, mode.offload, of.prefetch, of.live)
    memory = class_of(placement).memory(shape)
    return _Held(**vars(memory), input=cost.input, flops=sum(tower.flops for tower in towers))


def _seconds(job: PlannedJob, mode: Mode, flops: dict[str, float], wire: int, near: int, teacher: _Held) -> rates.Seconds:
    """wire: bytes sent; near: of them, those that stay in a group of hpZ."""
    peak, speedup = job.gpu.flops, rates.INT8_SPEEDUP if mode.int8 else 1.0
    fetched = teacher.host * job.rounds / rates.HOST_LINK
    numel = job.student.numel / (job.ranks if job.student_zero.stage else 1)
    memory = rates.HOST_MEMORY if job.student_zero.offload_optimizer else job.gpu.memory * rates.MEMORY_SHARE
    return rates.Seconds(
        flops["teacher"] / (peak * rates.FORWARD_SHARE * speedup) + fetched,
        flops["student"] / (peak * rates.TRAINING_SHARE),
        flops["loss"] / (peak * rates.LOSS_SHARE),
        (wire - near) / rates.link(job.gpu, job.ranks, job.per_node) + near / rates.link(job.gpu, job.student_zero.group, job.per_node),
        numel * rates.ADAMW_BYTES / memory,
    )
