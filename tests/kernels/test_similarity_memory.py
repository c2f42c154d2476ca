"""Memory: what the chunked backend is for, as the operating system sees it."""

from __future__ import annotations

import multiprocessing

import torch

from megakd.runtime.stopwatch import resident_gb
from megakd_kernels import similarity_kd
from support.loss_cases import batch

PAIRS = 8192


def _step(backend: str, pairs: int) -> None:
    student, teacher = batch(pairs, 32, 50.0).leaves(), batch(pairs, 48, 80.0)
    loss = similarity_kd(student, teacher, hard=True, backend=backend)
    (loss.kd + loss.hard).backward()


def _growth(backend: str) -> float:
    """Peak resident megabytes of forward and backward at PAIRS beyond those of a small step. For a process of its own."""
    torch.set_num_threads(1)
    _step(backend, 64)
    before = resident_gb("VmHWM")
    _step(backend, PAIRS)
    return (resident_gb("VmHWM") - before) * 1e9 / 2**20


def test_chunked_needs_at_most_a_tenth_of_eagers_memory_at_8192_pairs():
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        chunked, eager = (pool.apply(_growth, (backend,)) for backend in ("chunked", "eager"))
    print(f"peak beyond a small step at {PAIRS} pairs: chunked {chunked:.0f} MB, eager {eager:.0f} MB")
    assert eager > 4 * PAIRS**2 * 4 / 2**20  # the yardstick did hold several whole matrices of 256 MB
    assert chunked <= eager / 10
