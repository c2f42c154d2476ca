"""A group: all implementations of one loss at one size, in turns. What cannot be measured becomes a row with the reason.

Machines are noisy in phases that outlast a call. So the implementations alternate, each once a round, and their medians are over the same
rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from cases import PASSES, LossCase
from measure import Meter, Timing, is_out_of_memory
from memory import Watcher
from peers import PEERS, LossInputs, Unavailable
from records import OK, Row
from torch import Tensor

FEWEST_ROUNDS = 3
# A group takes rounds until this many seconds have gone into them.
GROUP_SECONDS = {"cuda": 2.0, "cpu": 4.0}
# A first call this long needs no second one to be free of start-up costs, unless something is compiled in it.
LONG_CALL = 2.0
COMPILE_SECONDS = 30.0


@dataclass
class Limits:
    """What the run may take. deadline: of `time.monotonic`; memory: bytes; matrix_rate: operations a second.

    tries_all: running out of memory is an error that a call survives, as on CUDA. Then only what would first be compiled is foreseen.
    """

    deadline: float
    memory: float
    matrix_rate: float
    tries_all: bool = False
    _known: dict[tuple[object, ...], tuple[int, float]] = field(default_factory=dict)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def learn(self, case: LossCase, seconds: float) -> None:
        self._known[case._replace(pairs=0)] = case.pairs, seconds

    def refusal(self, case: LossCase) -> str | None:
        """Why this case is not even begun: its memory or its time are foreseen to be too much."""
        needed = case.matrix_bytes
        if needed > self.memory and (case.implementation == "compiled" or not self.tries_all):
            return f"out of memory (predicted: {needed / 1e9:.1f} GB)"
        # Of one call: from the size last measured, by the square of N, and never less than the matrix products alone.
        pairs, last = self._known.get(case._replace(pairs=0), (case.pairs, 0.0))
        seconds = (FEWEST_ROUNDS + 1) * max(case.flops("both") / self.matrix_rate, last * (case.pairs / pairs) ** 2)
        if case.implementation == "compiled":
            seconds += COMPILE_SECONDS
        if seconds > self.left():
            return f"skipped: time budget (needs about {seconds:.0f} s)"
        return None


class Result(NamedTuple):
    """What became of a case."""

    case: LossCase
    status: str
    samples: list[Timing]
    note: str = ""


class Runner:
    """Measures groups on one device."""

    def __init__(self, meter: Meter, dtype: torch.dtype, limits: Limits, rounds: int) -> None:
        self._meter, self._dtype, self._limits, self._rounds = meter, dtype, limits, rounds
        self._watcher = Watcher() if meter.device.type == "cpu" else None

    def group(self, cases: Sequence[LossCase]) -> list[Result]:
        """One result a case, in order."""
        turns = {case: _Turn(case, self._limits.refusal(case)) for case in cases}
        for case, turn in turns.items():
            if turn.status is None:
                try:
                    turn.function = case.function()
                except Unavailable as error:
                    turn.status = f"unavailable: {error}"
        live = [turn for turn in turns.values() if turn.status is None]
        if live:
            student, teacher = live[0].case.inputs(self._meter.device, self._dtype)
            self._warm(live, student, teacher)
            self._take_rounds(live, student, teacher)
            del student, teacher
        return [turn.result(self._peaks(turn)) for turn in turns.values()]

    def _warm(self, live: list[_Turn], student: LossInputs, teacher: LossInputs) -> None:
        for turn in live:
            turn.status = self._limits.refusal(turn.case)  # the turns before it took their time
            first = turn.status is None and self._sample(turn, student, teacher)
            if first and (turn.case.compiles or first.both < LONG_CALL):
                first = self._sample(turn, student, teacher)
            elif first:
                turn.samples.append(first)
            if first:
                self._limits.learn(turn.case, turn.seconds)

    def _take_rounds(self, live: list[_Turn], student: LossInputs, teacher: LossInputs) -> None:
        a_round = sum(turn.seconds for turn in live)
        rounds = min(self._rounds, max(FEWEST_ROUNDS, int(GROUP_SECONDS[self._meter.device.type] / max(a_round, 1e-6))))
        for _ in range(rounds):
            for turn in live:
                if turn.status is None and len(turn.samples) < rounds:
                    if self._limits.left() < turn.seconds:
                        return
                    sample = self._sample(turn, student, teacher)
                    if sample:
                        turn.samples.append(sample)

    def _sample(self, turn: _Turn, student: LossInputs, teacher: LossInputs) -> Timing | None:
        """None where it failed; the turn's status says how."""
        began = time.monotonic()
        try:
            sample = self._meter.sample(turn.function, student, teacher)
            turn.seconds = time.monotonic() - began
            return sample
        except Unavailable as error:
            turn.status = f"unavailable: {error}"
            return None
        except Exception as error:  # the other implementations are still measured
            message = " ".join([type(error).__name__, *str(error).split()])[:160]
            turn.status = "out of memory" if is_out_of_memory(error) else f"failed: {message}"
        self._meter.clear()
        return None

    def _peaks(self, turn: _Turn) -> tuple[int | None, int | None]:
        if turn.status is not None or not turn.samples:
            return None, None
        last = turn.samples[-1]
        # On the CPU up to three calls and the libraries' start: worth it only inside the budget.
        if self._watcher is None or self._limits.left() < 3 * turn.seconds:
            return last.forward_bytes, last.both_bytes
        return self._watcher.peaks(turn.case, self._dtype) or (None, None)

    def close(self) -> None:
        """Ends the process that measures memory; groups measured after this go without."""
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None


class _Turn:
    """One case on its way through a group; `status` is set as soon as it has dropped out."""

    def __init__(self, case: LossCase, status: str | None) -> None:
        self.case, self.status = case, status
        self.function: Callable[..., Tensor]
        self.samples: list[Timing] = []
        self.seconds = 0.0  # that the last call took of the budget

    def result(self, peaks: tuple[int | None, int | None]) -> Result:
        status = self.status or (OK if self.samples else "skipped: time budget")
        samples = [sample._replace(forward_bytes=peaks[0], both_bytes=peaks[1]) for sample in self.samples]
        peer = PEERS.get(self.case.implementation)
        return Result(self.case, status, samples if status == OK else [], "" if peer is None else peer.note)


def rows(result: Result, passes: Sequence[str], matrix_rate: float, run: Row) -> list[Row]:
    """The result's rows, one a pass; the numbers of a case that was not measured are empty."""
    return [_row(result, one, matrix_rate, run) for one in passes if one in PASSES]


def _row(result: Result, one: str, matrix_rate: float, run: Row) -> Row:
    case, measured = result.case, {}
    if result.samples:
        times = torch.tensor([getattr(sample, one) for sample in result.samples], dtype=torch.float64) * 1e3
        p10, median, p90 = (times.quantile(q).item() for q in (0.1, 0.5, 0.9))
        rate = case.flops(one) / median * 1e3
        peak = result.samples[-1].forward_bytes if one == "forward" else result.samples[-1].both_bytes
        measured = {
            "median_ms": f"{median:.4g}",
            "p10_ms": f"{p10:.4g}",
            "p90_ms": f"{p90:.4g}",
            "peak_mb": "" if peak is None else f"{peak / 1e6:.4g}",
            "tflops": f"{rate / 1e12:.4g}",
            "percent_of_matrix": f"{100 * rate / matrix_rate:.3g}",
        }
    return {
        **run,
        "loss": case.loss,
        "pairs": str(case.pairs),
        "student_width": str(case.student_width),
        "teacher_width": str(case.teacher_width),
        "implementation": case.implementation,
        "pass": one,
        "status": result.status,
        "rounds": str(len(result.samples)),
        "matrix_tflops": f"{matrix_rate / 1e12:.4g}",
        "note": result.note,
        **measured,
    }
