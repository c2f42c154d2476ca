"""`cross` against the formula of CLIP-KD's code, on one process and on several, and what it has to do with `interactive`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.embeddings import Embeddings
from megakd.models.heads import ModelShape
from megakd.objectives.base import Objective, StepContext
from megakd_kernels import panels
from support.matrix_objectives import objective, pairs

# Legend: B rows of one rank, N of all, D student's width, T teacher's.
B, D, T = 5, 6, 8
WAYS = {"panels": ["kernels.backend=chunked"], "ring": ["kernels.backend=chunked", "kernels.ring=true"], "whole": ["kernels.backend=eager"]}


def _clip_kd(s_image: Tensor, s_text: Tensor, scale: Tensor, teacher: Embeddings) -> Tensor:
    """`cross_kd_loss` of CLIP-KD's loss.py, with a scale where that multiplies by a logarithm of one."""
    t_logits_per_image = teacher.scale * teacher.image @ teacher.text.T
    ways = ((scale * s_image @ teacher.text.T, t_logits_per_image), (scale * s_text @ teacher.image.T, t_logits_per_image.T))
    return sum(F.kl_div(F.log_softmax(own, dim=1), F.softmax(other, dim=1), reduction="batchmean") for own, other in ways) / 2  # type: ignore[return-value]


class _Student(nn.Module):
    """Both towers, a head and the scale, in float64."""

    def __init__(self, built: Objective) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(7, D), nn.Linear(8, D)
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        head = built.head(ModelShape(D), ModelShape(T))
        assert head is not None
        self.head = head
        self.double()

    def forward(self, image: Tensor, text: Tensor) -> Embeddings:
        image_BD, text_BD = self.image(image), self.text(text)
        outputs = self.head.project(image_BD, text_BD, {})
        scale = self.log_scale.exp()
        features = {"cross.scale": outputs["scale"].double()} if "scale" in outputs else {}
        return Embeddings(
            image_BD, text_BD, scale, None, {"cross": (_unit(self.head.image(image_BD)), _unit(self.head.text(text_BD)))}, features
        )  # type: ignore[operator]

    def gradients(self) -> list[Tensor]:
        return [torch.zeros_like(each) if each.grad is None else each.grad for each in self.parameters()]


def _unit(rows: Tensor) -> Tensor:
    """In float64, where the head itself takes its norm in float32."""
    return F.normalize(rows, dim=-1)


def _inputs(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    image, text = (torch.randn(count, width, generator=generator, dtype=torch.float64) for width in (7, 8))
    return image, text


def _expected(student: _Student, count: int, scale: str) -> list[Tensor]:
    """The loss and its gradients, times 2.5."""
    seen = student(*_inputs(count))
    by = {"student": seen.scale, "own": seen.features.get("cross.scale")}.get(scale, torch.tensor(30.0, dtype=torch.float64))
    assert by is not None
    loss = _clip_kd(*seen.projected["cross"], by, pairs(count, T, 40.0, 2))
    (2.5 * loss).backward()
    return [loss.detach(), *student.gradients()]


@pytest.mark.parametrize("scale", ["student", "own", "30.0"])
@pytest.mark.parametrize("way", WAYS)
def test_cross_is_the_authors_formula_with_its_gradient(recipe_file: Path, way: str, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 11
    monkeypatch.setitem(panels.PANEL_BYTES, "cpu", 4 * count * 8)  # the last panel has three rows
    built = objective(str(recipe_file), "cross", f"cross.scale={scale}", *WAYS[way])
    student = _Student(built)
    (loss,) = built(StepContext(student(*_inputs(count)), [pairs(count, T, 40.0, 2)])).values()
    (2.5 * loss).backward()
    found = [loss.detach(), *student.gradients()]
    for ours, true in zip(found, _expected(_Student(built), count, scale), strict=True):
        assert (ours - true).norm() <= 1e-11 * max(float(true.norm()), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_a_student_that_is_its_teacher_has_a_loss_of_zero_and_hardly_a_gradient(recipe_file: Path, way: str, dtype: torch.dtype) -> None:
    teacher = pairs(9, T, 40.0, 2, dtype)
    image, text = teacher.image.clone().requires_grad_(), teacher.text.clone().requires_grad_()
    built = objective(str(recipe_file), "cross", *WAYS[way])
    (loss,) = built(StepContext(teacher._replace(projected={"cross": (image, text)}), [teacher])).values()
    assert loss.dtype == torch.float32
    assert loss == 0.0
    loss.backward()
    assert all(leaf.grad is not None and leaf.grad.float().abs().max() < 1e-5 for leaf in (image, text))


def test_of_a_teacher_that_is_sure_of_its_pairs_cross_is_interactive(recipe_file: Path) -> None:
    """Where the teacher's softmax is 1 at the pair, KL divergence is the cross-entropy with the pair's label."""
    rows = torch.eye(T, dtype=torch.float64)
    teacher, queries = Embeddings(rows, rows, torch.tensor(1000.0)), pairs(T, T, 7.0, 4)
    losses = [
        next(iter(objective(str(recipe_file), name)(StepContext(queries._replace(projected={name: queries[:2]}), [teacher])).values()))
        for name in ("cross", "interactive")
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_a_bf16_student_of_a_float32_teacher(recipe_file: Path) -> None:
    teacher, student = pairs(9, T, 40.0, 2, torch.float32), pairs(9, T, 20.0, 3, torch.bfloat16)
    student = student._replace(scale=torch.tensor(20.0))
    for settings in WAYS.values():
        (loss,) = objective(str(recipe_file), "cross", *settings)(
            StepContext(student._replace(projected={"cross": student[:2]}), [teacher])
        ).values()
        torch.testing.assert_close(loss, _clip_kd(student.image.float(), student.text.float(), student.scale, teacher))


def _work(rank: int, world: int, folder: str, recipe_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    panels.PANEL_BYTES["cpu"] = 2 * world * B * 8
    own, results = slice(rank * B, (rank + 1) * B), dict[str, list[Tensor]]()
    whole = pairs(B * world, T, 40.0, 2)
    teacher = whole._replace(image=whole.image[own], text=whole.text[own])
    for way, settings in WAYS.items():
        built = objective(recipe_file, "cross", *settings)
        student = _Student(built)
        (loss,) = built(StepContext(student(*(side[own] for side in _inputs(B * world))), [teacher], dist.group.WORLD)).values()
        (2.5 * loss).backward()
        gradients = student.gradients()
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= world
        results[way] = [loss.detach(), *gradients]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, recipe_file: Path) -> Sequence[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_work, (request.param, str(folder), str(recipe_file)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("way", WAYS)
def test_the_mean_gradient_over_ranks_is_that_of_one_process(outcomes: Sequence[dict[str, Any]], recipe_file: Path, way: str) -> None:
    expected = _expected(_Student(objective(str(recipe_file), "cross")), B * len(outcomes), "student")
    for outcome in outcomes:
        for ours, true in zip(outcome[way], expected, strict=True):
            assert (ours - true).norm() <= 1e-11 * max(float(true.norm()), 1e-3)
