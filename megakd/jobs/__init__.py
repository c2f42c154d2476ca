"""Runs as SLURM jobs: how they are submitted, what each task does, where they are.

Pickles of queued jobs name `megakd.jobs.Training`. It is imported on access: submitit takes half a second, and `megakd --help` needs
`resources` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megakd.jobs.task import Training

__all__ = ["Training"]


def __getattr__(name: str) -> Any:
    if name != "Training":
        raise AttributeError(f"module 'megakd.jobs' has no attribute {name!r}")
    from megakd.jobs.task import Training

    return Training
