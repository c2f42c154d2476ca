"""Runs as SLURM jobs: how they are submitted, what each task does, where they are. Pickles of queued jobs name `megakd.jobs.Training`."""

from megakd.jobs.task import Training

__all__ = ["Training"]
