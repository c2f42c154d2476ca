"""The tiles of the chunked backend on a CPU: one exponential for rows and columns where digits allow it, and what is kept for backward."""

from __future__ import annotations

import pytest
import torch

from megakd_kernels import similarity_kd, two_pass_torch
from megakd_kernels.two_pass_torch import TorchTwoPass
from support.loss_cases import Batch, Watch, batch

PAIRS, TILE = 96, 32
STUDENT, TEACHER = batch(PAIRS, 24, 50, seed=1), batch(PAIRS, 40, 80, seed=2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """3 x 3 of them."""
    monkeypatch.setattr(two_pass_torch, "CPU_ROWS", TILE)
    monkeypatch.setattr(two_pass_torch, "CPU_COLUMNS", TILE)
    monkeypatch.setattr(two_pass_torch, "LEAST_KEPT", 0)


def _gradients(student: Batch, teacher: Batch | None, **options) -> list[torch.Tensor]:
    leaves = student.leaves()
    loss = similarity_kd(leaves, teacher, hard=True, backend="chunked", **options)
    (loss.kd + loss.hard).backward()
    return [loss.kd.detach(), loss.hard.detach(), *leaves.gradients()[:3]]


def _exponentials(monkeypatch, student: Batch, teacher: Batch | None, **options) -> int:
    """How many tiles of the forward pass took an exponential for each side."""
    taken = []
    plain = two_pass_torch.panel_stats
    with monkeypatch.context() as patch:
        patch.setattr(two_pass_torch, "panel_stats", lambda *arguments: taken.append(1) or plain(*arguments))
        _gradients(student, teacher, **options)
    return len(taken)


def test_rows_and_columns_share_an_exponential_at_clips_own_scales(monkeypatch):
    assert _exponentials(monkeypatch, batch(PAIRS, 256, 100, seed=1), batch(PAIRS, 512, 100, seed=2)) == 0


@pytest.mark.parametrize("place", ["student", "teacher"])
def test_a_line_far_below_the_others_has_an_exponential_of_its_own_in_its_tiles_alone(monkeypatch, place):
    """Row 40 lies in the second of three rows of tiles."""
    far = {"student": STUDENT, "teacher": TEACHER}
    image = far[place].image.clone()
    image[40] = -far[place].text.sum(0) / far[place].text.sum(0).norm() * 20
    far[place] = far[place]._replace(image=image)
    assert _exponentials(monkeypatch, far["student"], far["teacher"]) == 3


def test_a_temperature_below_one_counts_in_the_range_of_the_hard_part(monkeypatch):
    """Its exponent is the temperature's times as large."""
    assert _exponentials(monkeypatch, batch(PAIRS, 64, 30, seed=1), batch(PAIRS, 64, 30, seed=2), temperature=1.0) == 0
    assert _exponentials(monkeypatch, batch(PAIRS, 64, 900, seed=1), batch(PAIRS, 64, 900, seed=2), temperature=30.0) == 9


def test_what_is_kept_takes_no_more_memory_than_the_embeddings_or_64_mb_and_the_widest_model_comes_first(monkeypatch):
    kernels = TorchTwoPass.of(8192, 8192, torch.float32, torch.device("cpu"), 512)._replace(columns=512)
    student, teacher = kernels.kept_tiles(8192, 8192, (512, 1024))
    assert (student, teacher) == (0, 96)
    assert teacher * 512 * 512 == 2 * 8192 * (512 + 1024)
    assert kernels.kept_tiles(1024, 1024, (512, 1024)) == [4, 4]  # all there are
    assert kernels.kept_tiles(2048, 2048, (512, 1024)) == [8, 16]
    monkeypatch.setattr(two_pass_torch, "LEAST_KEPT", 16 << 20)
    assert kernels.kept_tiles(8192, 8192, (512,)) == [64]  # 64 MB
    on_a_gpu = TorchTwoPass.of(8192, 8192, torch.float32, torch.device("cuda"), None)
    assert on_a_gpu.kept_tiles(8192, 8192, (512, 1024)) == [0, 0]


def test_kept_logits_are_not_multiplied_again():
    """9 tiles: 18 products forward, 18 of the gradient, and those logits again that were not kept: 12 tiles fit beside the embeddings."""
    kept = sum(TorchTwoPass.of(PAIRS, PAIRS, torch.float32, torch.device("cpu"), None).kept_tiles(PAIRS, PAIRS, (24, 40)))
    assert kept == 12
    with Watch() as watch:
        _gradients(STUDENT, TEACHER)
    assert watch.products == 18 + 18 + (18 - kept)


@pytest.mark.parametrize("options", [{"temperature": 2.0}, {"temperature": 0.05}, {}], ids=str)
def test_kept_logits_change_no_bit(options, monkeypatch):
    kept = _gradients(STUDENT, TEACHER, **options)
    monkeypatch.setattr(TorchTwoPass, "kept_tiles", lambda self, rows, columns, widths: [0] * len(widths))
    again = _gradients(STUDENT, TEACHER, **options)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_a_second_backward_pass_finds_the_kept_logits_as_they_were():
    leaves = STUDENT.leaves()
    loss = similarity_kd(leaves, TEACHER, backend="chunked").kd
    first, second = (torch.autograd.grad(loss, leaves[:3], retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_without_a_gradient_nothing_is_kept():
    with torch.no_grad(), Watch() as watch:
        similarity_kd(STUDENT.leaves(), TEACHER, hard=True, backend="chunked")
    assert watch.elements <= max(TILE * TILE, PAIRS * 40)
