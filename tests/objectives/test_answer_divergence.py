"""The divergence of two decoders' words, against formulas written out in float64, and what becomes of padding, panels and odd logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megakd.objectives.answer_divergence import TokenDivergence
from megakd.objectives.answers import AnswerLoss
from megakd.planning.memory_tracker import MemoryTracker
from megakd.recipe import AnswerTeacher
from megakd.runtime.launch import World
from megakd_kernels import panels

KINDS = ("forward", "reverse", "js")
N, V = 7, 11


def logits(rows: int = N, words: int = V, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(rows, words, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def divergence(teacher: Tensor, kind: str, temperature: float = 1.0, words: int = V) -> TokenDivergence:
    return TokenDivergence(AnswerTeacher(bundle="any", divergence=kind, temperature=temperature), teacher, words)


def written_out(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """Probabilities first, then sums of p log(p / q), for autograd to differentiate."""
    q, p = ((one / temperature).exp() / (one / temperature).exp().sum(1, keepdim=True) for one in (student, teacher))

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return (one * (one / other).log()).sum(1)

    of: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "js": lambda: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
    }
    return temperature**2 * of[kind]()


def published(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """GKD's generalised divergence as TRL's GKDTrainer computes it, a row each; its beta of 0 and 1 are the two limits."""
    own, other = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    if beta in (0, 1):
        first, second = (own, other) if beta == 0 else (other, own)
        return F.kl_div(first, second, reduction="none", log_target=True).sum(1)
    share = torch.tensor(beta, dtype=own.dtype)
    mixture = torch.logsumexp(torch.stack([own + torch.log(1 - share), other + torch.log(share)]), dim=0)
    to_teacher, to_student = (F.kl_div(mixture, one, reduction="none", log_target=True).sum(1) for one in (other, own))
    return beta * to_teacher + (1 - beta) * to_student


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_formula(kind: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In panels of two rows, the last of one; the gradient from above differs from row to row, 2.5 on average."""
    monkeypatch.setitem(panels.PANEL_BYTES, "cpu", 2 * V * 8)
    student, teacher = logits().requires_grad_(), logits(seed=1)
    above = torch.linspace(1.0, 4.0, N, dtype=torch.float64)
    found = divergence(teacher, kind, temperature)(student)
    expected = written_out(student, teacher, kind, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value, student, above)[0] for value in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0), ("js", 0.5), ("reverse", 1)])
def test_it_is_gkds_times_the_square_of_the_temperature(kind: str, beta: float) -> None:
    student, teacher = logits(), logits(seed=1)
    found = divergence(teacher, kind, 3.0)(student)
    torch.testing.assert_close(found, 9 * published(student, teacher, beta, 3.0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_like_its_teacher_has_nothing_to_learn(kind: str, dtype: torch.dtype) -> None:
    """To the last bit: nothing of rounding adds up over a run."""
    teacher = logits(40, 500, dtype=dtype)
    student = teacher.float().requires_grad_()
    found = divergence(teacher, kind, 0.7, 500)(student)
    assert not found.any()
    assert not torch.autograd.grad(found.sum(), student)[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_about_the_same_at_every_high_temperature(kind: str) -> None:
    """What the factor t squared is for; without it, of 50 against 100, it would be four times as large."""
    teacher, norms = logits(seed=1), []
    for temperature in (50.0, 100.0):
        student = logits().requires_grad_()
        norms.append(torch.autograd.grad(divergence(teacher, kind, temperature)(student).sum(), student)[0].norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_past_the_words_of_both_count_for_nothing(kind: str) -> None:
    """Output layers of 13 and 16 rows for 11 words, whatever stands in the padding."""
    student, teacher = logits(words=13).requires_grad_(), logits(words=16, seed=1)
    found = divergence(teacher, kind)(student)
    torch.testing.assert_close(found, divergence(teacher[:, :V], kind)(student[:, :V]), rtol=0, atol=0)
    gradient = torch.autograd.grad(found.sum(), student)[0]
    assert gradient.shape == student.shape
    assert gradient[:, :V].any()
    assert not gradient[:, V:].any()


def test_words_that_cannot_be_said_count_for_nothing() -> None:
    """Some models mask words with a logit of minus infinity. Where one alone does, KL is infinite and Jensen-Shannon's is not."""
    student, teacher = logits(), logits(seed=1)
    student[:, 3] = teacher[:, 3] = -math.inf
    rest = [word for word in range(V) if word != 3]
    for kind in KINDS:
        masked = student.clone().requires_grad_()
        found = divergence(teacher, kind)(masked)
        torch.testing.assert_close(found, divergence(teacher[:, rest], kind, words=V - 1)(student[:, rest]))
        gradient = torch.autograd.grad(found.sum(), masked)[0]
        assert gradient.isfinite().all()
        assert not gradient[:, 3].any()
    teacher[:, 5] = -math.inf
    assert divergence(teacher, "forward")(student).isfinite().all()
    assert divergence(teacher, "reverse")(student).isinf().all()
    alone = student.clone().requires_grad_()
    found = divergence(teacher, "js")(alone)
    assert bool((found < math.log(2)).all())
    assert torch.autograd.grad(found.sum(), alone)[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_overflow_nowhere(kind: str) -> None:
    teacher, student = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    found = divergence(teacher, kind, 1.0, 3)(student)
    assert found.item() == pytest.approx(math.log(2) if kind == "js" else 2e4, rel=1e-4)
    assert torch.autograd.grad(found.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_near_float64_for_a_vocabulary_of_100_000(kind: str) -> None:
    student, teacher = logits(3, 100_000), logits(3, 100_000, seed=1)
    exact = divergence(teacher, kind, 1.5, 100_000)(student)
    found = divergence(teacher.float(), kind, 1.5, 100_000)(student.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_between_the_passes_nothing_is_held_but_the_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peaks of forward and backward are some panels, and the gradient."""
    rows, words = 512, 2048
    matrix, panel = rows * words * 4, 64 << 10
    monkeypatch.setitem(panels.PANEL_BYTES, "cpu", panel)
    student, teacher = logits(rows, words, dtype=torch.float32).requires_grad_(), logits(rows, words, seed=1, dtype=torch.float32)
    watch = MemoryTracker("cpu")
    watch.ignore([student, teacher])
    with watch:
        found = divergence(teacher, kind, 1.0, words)(student)
        assert watch.live < 16 * rows
        assert watch.peak < 12 * panel + 16 * rows
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert watch.peak < matrix + 12 * panel + 16 * rows
    assert gradient.shape == (rows, words)


def test_both_losses_are_means_over_the_global_batchs_tokens() -> None:
    """Sums over a part, over the count of all, times the ranks: their mean over ranks is the loss."""
    outputs: dict[str, Any] = {"answer_nll": torch.tensor([3.0, 5.0]), "answer_kl": torch.tensor([1.0, 2.0]), "answer_tokens": None}
    losses = AnswerLoss(World(0, 2, torch.device("cpu"))).losses(outputs, 16.0)
    assert {name: value.item() for name, value in losses.items()} == {"answer": 1.0, "answer_kl": 0.375}
    del outputs["answer_kl"]
    assert AnswerLoss(World(0, 1, torch.device("cpu"))).losses(outputs, 16.0).keys() == {"answer"}
