"""What only tools of a GPU machine can see: NVIDIA's checkers watch the Triton kernels' memory accesses and their shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from support import python_path

pytestmark = pytest.mark.gpu

# Parts of names of kernels: all of ours end in "_kernel". Races are looked for in those that share memory between warps, and not in
# cuBLAS's, which racecheck does not understand.
CHECKS = [("memcheck", "_kernel"), ("racecheck", "_statistics_kernel"), ("racecheck", "_slope_kernel")]
LIMIT = 60  # seconds; `make gpu` has minutes for all tests together

# Sizes that fill no tile, both ways of keeping maxima, and no allocator between the kernels and the ends of their tensors.
PROGRAM = """
import torch
from support.loss_cases import batch
from megakd_kernels import similarity_kd

student, teacher = (batch(201, width, 30.0, dtype=torch.bfloat16).to("cuda") for width in (48, 72))
for scale_limit in (None, 30.0):
    leaves = student.leaves()
    loss = similarity_kd(leaves, teacher, hard=True, backend="triton", scale_limit=scale_limit)
    (loss.kd + loss.hard).backward()
    torch.cuda.synchronize()
print("finished")
"""


@pytest.mark.parametrize(("tool", "kernels"), CHECKS)
def test_compute_sanitizer_finds_nothing_in_the_triton_kernels(tool, kernels):
    checker = shutil.which("compute-sanitizer")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if checker is None:
        pytest.skip("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    options = ["--tool", tool, "--kernel-name", f"kns={kernels}", "--error-exitcode", "9", "--report-api-errors", "no"]
    command = [checker, *options, "--target-processes", "application-only", sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "PYTHONPATH": python_path(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer did not finish in {LIMIT} s")
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device or virtual machine")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "finished" in done.stdout
