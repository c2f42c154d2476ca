"""Cases, bounds and the unit of error for the tests of `interactive_kd` and `sigmoid_kd`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

from support import python_path
from support.loss_cases import EPS, Batch, Case, Outcome, batch, errors, measure_reference

LOSSES = ("interactive", "sigmoid")

# Shares of `rounding` that eager's error, and what the others' errors have beyond it, may reach: about twice the largest seen over the
# cases below on one CPU. interactive: 0.20, 0.52, 0.52 and 0.006; nothing was seen beyond eager's. sigmoid: 0.86, 0.57, 0.12, 0.11, 0.09,
# 0.11; beyond eager's 0.03 of the scale's.
MARGIN = {"interactive": Outcome.of(0.4, 0.0, 1.1, 1.1, 0.02), "sigmoid": Outcome.of(1.5, 1.2, 0.25, 0.25, 0.2, 0.25)}
EXCESS = {"interactive": Outcome.of(0.1, 0.0, 0.1, 0.1, 0.02), "sigmoid": Outcome.of(0.1, 0.1, 0.05, 0.05, 0.06, 0.05)}

# interactive: pairs, width, scale, chunk; sigmoid: pairs, width, scale, bias, (width, scale, bias) of each teacher, chunk
CASES = {
    "interactive": [
        (1, 48, 20, 1),
        (2, 64, 50, 1),
        (37, 48, 100, 8),
        (37, 1536, 200, 37),
        (129, 512, 1, 50),
        (129, 64, 200, 128),
        (1000, 256, 100, 300),
        (1000, 64, 10, 999),
    ],
    "sigmoid": [
        (1, 48, 20, -10, [(64, 20, -5)], 1),
        (2, 48, 10, 5, [(64, 50, -20)], 1),
        (37, 48, 100, -20, [(1536, 30, -10)], 37),
        (37, 64, 200, -10, [(48, 200, 0), (64, 1, 5)], 8),
        (129, 512, 1, 0, [(768, 1, -1)], 50),
        (129, 1536, 117, -16.5, [(48, 110, -12.9)], 128),
        (1000, 256, 10, -10, [(64, 112, -16)], 300),
        (1000, 64, 117, -13, [(64, 100, -12), (96, 30, -12)], 999),
    ],
}


def case_of(loss: str, shape: Sequence, dtype: torch.dtype = torch.float32) -> Case:
    """shape: a row of CASES without its chunk."""
    if loss == "interactive":
        pairs, width, scale = shape
        return make(loss, pairs, width, scale, [(width, 30.0, 0.0)], dtype=dtype)
    pairs, width, scale, bias, teachers = shape
    return make(loss, pairs, width, scale, teachers, bias=bias, dtype=dtype)


def make(
    loss: str,
    pairs: int,
    width: int,
    scale: float,
    teachers: Sequence[tuple[int, float, float]],
    *,
    bias: float = -10.0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """teachers: width, scale and bias of each."""
    guides = tuple(batch(pairs, *each, dtype, seed=2 + place) for place, each in enumerate(teachers))
    return Case(loss, batch(pairs, width, scale, bias, dtype, seed=1), guides)


def rounding(case: Case, *, upstream: float = 2.5) -> Outcome:
    """How far one float32 rounding of the largest logit can move each part: the unit in which errors are judged.

    A relative error alone would judge the data: a loss of 1e-10 from logits of 100 has no correct digit in float32.
    """
    return (_interactive_rounding if case.loss == "interactive" else _sigmoid_rounding)(case, upstream)


def _interactive_rounding(case: Case, upstream: float) -> Outcome:
    """A logit wrong by d makes -log softmax wrong by up to 2 d and the softmax by a factor 1 + d; a row's slope has a norm of up to 2."""
    (image, text, scale, _), teacher = (tensor.double() for tensor in case.student), case.teachers[0]
    products = (image @ teacher.text.double().T, text @ teacher.image.double().T)
    soft = EPS * (1 + max(float((scale * product).abs().max()) for product in products))
    width = upstream * scale * soft / len(image) ** 0.5
    return Outcome(*(torch.as_tensor(part).double() for part in (2 * soft, 0, width, width, 2 * upstream * soft, 0)))


def _logits(pair: Batch) -> Tensor:
    image, text, scale, bias = (tensor.double() for tensor in pair)
    return scale * image @ text.T + bias


def _sigmoid_rounding(case: Case, upstream: float) -> Outcome:
    """Every term of the sums by itself, as if all roundings had one sign: what wrong logits do to it, and its own evaluation.

    Near 0 loss (well matched, or far apart in student and teacher alike) a term may only be wrong by eps times its small summands.
    """
    a, targets = _logits(case.student), [_logits(teacher) for teacher in case.teachers]
    pairs, scale = len(a), float(case.student.scale)
    wrong = EPS * (1 + max(float(logits.abs().max()) for logits in (a, *targets)))
    steep = torch.sigmoid(a) * torch.sigmoid(-a)
    kd, slope = torch.zeros_like(a), torch.zeros_like(a)
    for b in targets:
        bent, difference = torch.sigmoid(b) * torch.sigmoid(-b), a - b
        kd += wrong * ((a.sigmoid() - b.sigmoid()).abs() + bent * difference.abs())
        kd += EPS * (softplus(-a.abs()) + softplus(-b.abs()) + torch.sigmoid(-b.abs()) * difference.abs())
        slope += upstream * (wrong * (steep + bent) + EPS * (a.sigmoid() + b.sigmoid()))
    if targets:
        kd, slope = kd / len(targets), slope / len(targets)
    hard = torch.zeros_like(a)
    if case.hard:
        agreement = 2 * torch.eye(pairs, dtype=a.dtype) - 1
        hard = wrong * torch.sigmoid(-agreement * a) + EPS * softplus(-agreement * a)
        slope = slope + 0.5 * upstream * (wrong * steep + EPS * torch.sigmoid(-agreement * a))
    sums = (slope.sum(1).norm() * scale, slope.sum(0).norm() * scale, slope.sum() * (1 + wrong), slope.sum())
    return Outcome(*(total / pairs for total in (kd.sum(), hard.sum(), *sums)))


def judge(case: Case, outcomes: dict[str, Outcome], excess: Outcome | None = None, halves: bool = False) -> None:
    """outcomes["eager"] is within MARGIN of float64 in roundings, and the others' errors within `excess` of eager's, by default EXCESS.

    halves: the device multiplies halves, so the slopes were rounded to the embeddings' dtype before the second product.
    """
    truth, unit = measure_reference(case), rounding(case)
    margin, excess = MARGIN[case.loss], excess or EXCESS[case.loss]
    eager = errors(outcomes["eager"], truth)
    for place, part in enumerate(Outcome._fields):
        one, true = unit[place], truth[place].norm()
        dtype = getattr(case.student, part).dtype if part in Batch._fields else torch.float32
        returned = torch.finfo(dtype).eps / 2 * true
        assert eager[place] <= returned + margin[place] * one, f"eager {part}: off by {eager[place]:.3g}, unit {one:.3g}, true {true:.3g}"
        for name, outcome in outcomes.items():
            off = errors(outcome, truth)[place]
            cast = 4 * torch.finfo(case.student.image.dtype).eps if halves and part in ("image", "text", "scale") else EPS
            more = cast * true + excess[place] * one
            assert off <= eager[place] + more, f"{name} {part}: off by {off:.3g}, eager {eager[place]:.3g}, unit {one:.3g}, true {true:.3g}"


def interpreted(script: str, result: Path) -> object:
    """What `script` saves in `result` when it runs under Triton's interpreter, which must be chosen before Triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": python_path()}
    subprocess.run([sys.executable, script, str(result)], env=environment, check=True, timeout=280)
    return torch.load(result, weights_only=False)
