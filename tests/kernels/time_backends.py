"""Times the backends of `similarity_kd`, forward and backward with KD and InfoNCE: where the numbers in `similarity.py` come from.

OMP_NUM_THREADS=1 PYTHONPATH=kernels python tests/kernels/time_backends.py 256 1024 4096
"""

from __future__ import annotations

import sys
import time

import torch
from similarity_cases import Batch, batch

from megakd_kernels import similarity_kd

TEMPERATURE = 1.0


def seconds(backend: str, student: Batch, teacher: Batch) -> float:
    """The best of several runs, each ended by a wait for the device."""
    pairs, best = len(student.image), float("inf")
    for _ in range(max(3, min(30, 4_000_000 // pairs**2))):
        leaves = student.leaves()
        start = time.perf_counter()
        loss = similarity_kd(leaves, teacher, temperature=TEMPERATURE, hard=True, backend=backend)
        (loss.kd + loss.hard).backward()
        if leaves.image.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(f"torch {torch.__version__}, {device}, {dtype}, {torch.get_num_threads()} threads, widths 256 and 512, ms")
    for pairs in map(int, sys.argv[1:]):
        student, teacher = (Batch(*(x.to(device) for x in batch(pairs, width, 50.0, dtype))) for width in (256, 512))
        print(pairs, *(f"{name} {1000 * seconds(name, student, teacher):.1f}" for name in ("eager", "chunked")), flush=True)


if __name__ == "__main__":
    main()
