"""STUDY/study.json: what a study varies and how far it is, which `megakd report` and `megakd study --watch` read."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.runtime import environment
from megakd.runtime.run_folder import write_json
from megakd.study.execute import NOT_STARTED
from megakd.study.grid import Grid
from megakd.study.results import AXES, DONE, FAILED, FORMAT, MISSING, RUNNING, STUDY
from megakd.study.spec import StudySpec
from megakd.study.work import Work, is_scored
from megakd.version import __version__


@dataclass(frozen=True)
class Record:
    """data: a checksum by the name of each data set. file: the study's, as it was given."""

    spec: StudySpec
    grid: Grid
    work: Work
    out: Path
    file: str
    data: Mapping[str, str]

    def write(self, running: Iterable[str] = (), failed: Mapping[str, str] | None = None) -> None:
        """The state of every run now. failed: those that this process has given up, with the reason."""
        spec, states = self.spec, _States(self.work, self.out, set(running), failed or {})
        plain = next((name for name, method in spec.methods.items() if not method.teacher), None)
        content = {
            "format": FORMAT,
            "title": spec.title,
            "question": spec.question,
            "asks": spec.asks,
            "file": self.file,
            "command": shlex.join(["megakd", *sys.argv[1:]]),
            "commit": environment.commit(),
            "version": __version__,
            "data": dict(self.data),
            "axes": {axis: spec.axis(axis) for axis in AXES},
            "scores": [self._score(score) | {"main": not number} for number, score in enumerate(map(dict, spec.scores))],
            "plain_method": plain,
            "cells": [
                {
                    "id": cell.id,
                    "axes": dict(cell.axes),
                    "recipe": self._recipe(self.work.cells[cell.id][0]),
                    **states.of(*self.work.cells[cell.id]),
                }
                for cell in self.grid.cells
            ],
            "teachers": [{"name": name, **states.of(*jobs)} for name, jobs in self.work.teachers.items() if any(jobs)],
            "controls": [{"name": name, **states.of(*jobs)} for name, jobs in self.work.controls.items()],
            "hypotheses": [hypothesis.model_dump(mode="json", exclude_none=True) for hypothesis in spec.hypotheses],
            "jobs": [{"name": job.name, "kind": job.kind, "status": states.one(job.name)[0]} for job in self.work.jobs.values()],
        }
        write_json(self.out / STUDY, content)

    def _score(self, score: Mapping[str, Any]) -> dict[str, Any]:
        return {**score, "title": score["title"] or score["name"]}

    def _recipe(self, job: str) -> str:
        return str(self.work.jobs[job].recipe_file(self.out).relative_to(self.out))


@dataclass
class _States:
    work: Work
    out: Path
    running: set[str]
    failed: Mapping[str, str]

    def one(self, name: str) -> tuple[str, str]:
        if name in self.running:
            return RUNNING, ""
        if name in self.failed:
            return (MISSING if self.failed[name].startswith(NOT_STARTED) else FAILED), self.failed[name]
        return self.work.jobs[name].state(self.out)

    def of(self, run: str | None, readout: str | None) -> dict[str, Any]:
        """Where the scores of a row lie, and how far it is: that of its worst run."""
        names = [name for name in (run, readout) if name is not None]
        states = [self.one(name) for name in names]
        order = (FAILED, RUNNING, MISSING, DONE)
        status, message = min(states, key=lambda state: order.index(state[0]), default=(MISSING, ""))
        folders = {role: name for role, name in (("student", run), ("readout", readout)) if name is not None}
        return {
            "folder": run or readout,
            "folders": {role: name for role, name in folders.items() if is_scored(self.work.jobs[name].recipe)},
            "status": status,
            "message": message,
        }
