"""Objectives over the similarity matrix on two and three ranks: the loss and, averaged over ranks, the gradient of one process."""

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
from torch.nn.functional import normalize

from megakd.models.embeddings import Embeddings
from megakd.objectives.base import StepContext
from megakd_kernels import panels
from support.matrix_objectives import called, objective, pairs

# Legend: B rows of one rank, N of all, D width.
B = 5
# Each in panels of two rows, and of the whole lines that a rank has.
NAMES = ("dist", "dkd", "standardised", "gradient", "rkd")
WAYS = {"panels": ["kernels.backend=chunked"], "whole": ["kernels.backend=eager"]}


class _Encoder(nn.Module):
    """Both towers and the scale: a parameter of each kind that a loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(7, 6).double(), nn.Linear(8, 6).double()
        self.log_scale = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))

    def forward(self, image: Tensor, text: Tensor) -> Embeddings:
        return Embeddings(normalize(self.image(image), dim=-1), normalize(self.text(text), dim=-1), self.log_scale.exp())

    def gradients(self) -> list[Tensor]:
        return [torch.zeros_like(each) if each.grad is None else each.grad for each in self.parameters()]


def _inputs(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    image, text = (torch.randn(count, width, generator=generator, dtype=torch.float64) for width in (7, 8))
    return image, text


def _teachers(count: int) -> list[Embeddings]:
    return [pairs(count, 6, 30.0, 2), pairs(count, 6, 15.0, 3)]


def _rows(model: Embeddings, own: slice) -> Embeddings:
    return model._replace(image=model.image[own], text=model.text[own])


def _work(rank: int, world: int, folder: str, recipe_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    panels.PANEL_BYTES["cpu"] = 2 * world * B * 8
    own, group, results = slice(rank * B, (rank + 1) * B), dist.group.WORLD, dict[Any, Any]()
    teachers = [_rows(teacher, own) for teacher in _teachers(B * world)]
    for name in NAMES:
        for way, settings in WAYS.items():
            encoder, built = _Encoder(), objective(recipe_file, name, *settings)
            (loss,) = built(StepContext(encoder(*(side[own] for side in _inputs(B * world))), teachers, group)).values()
            (2.5 * loss).backward()
            gradients = encoder.gradients()
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= world
            results[name, way] = [loss.detach(), *gradients]
        twin = _rows(pairs(B * world, 6, 30.0, 2, torch.bfloat16), own)
        results[name, "twin"] = float(next(iter(built(StepContext(twin, [twin], group)).values())))
        try:
            uneven = _rows(pairs(B * world, 6, 30.0, 2), slice(0, B - (rank == 1)))
            built(StepContext(uneven, [uneven], group))
        except ValueError as error:
            results[name, "uneven"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, recipe_file: Path) -> Sequence[dict[Any, Any]]:
    """What every rank wrote down; one start of the processes serves every test below."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_work, (request.param, str(folder), str(recipe_file)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_gradient_is_that_of_one_process(outcomes: Sequence[dict[Any, Any]], recipe_file: Path, name: str, way: str) -> None:
    encoder, count = _Encoder(), B * len(outcomes)
    loss = called(objective(str(recipe_file), name))(encoder(*_inputs(count)), _teachers(count))
    (2.5 * loss).backward()
    for outcome in outcomes:
        for ours, true in zip(outcome[name, way], [loss.detach(), *encoder.gradients()], strict=True):
            assert (ours - true).norm() <= 1e-11 * max(true.norm(), 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_is_its_teacher_has_a_loss_of_zero_on_every_rank(outcomes: Sequence[dict[Any, Any]], name: str) -> None:
    assert [outcome[name, "twin"] for outcome in outcomes] == [0.0] * len(outcomes)


@pytest.mark.parametrize("name", NAMES)
def test_uneven_ranks_all_raise(outcomes: Sequence[dict[Any, Any]], name: str) -> None:
    assert all(f"rows: {B} on rank 0, {B - 1} on rank 1" in outcome[name, "uneven"] for outcome in outcomes)
