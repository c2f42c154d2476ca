"""What a run folder holds, read so that no damaged or missing file ends in an exception: what is not there is empty."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megakd.evaluation import report
from megakd.objectives.answers import DIVERGENCE, NAME
from megakd.pages.records import losses_of, number, scores_by_step
from megakd.pages.texts import clean, cleaned, json_object
from megakd.recipe import Recipe, texts
from megakd.recipe import load as recipes
from megakd.runtime.locks import held
from megakd.runtime.run_folder import BUNDLE, EVALUATION, FAILED, METRICS, MODEL, RUN, SAVED, read_metrics
from megakd.runtime.watchdog import HUNG

KINDS = ("zero_shot", "retrieval", "hard_negatives", "reader", "probe", "vqa")  # of evaluation sets
_OF_ANSWERS = {NAME: "answers.weight", DIVERGENCE: "answers.teacher.weight"}  # keys of their weights
_LOG_LINES, _LOG_BYTES = 6, 8192  # of a log whose run left no last words


class State(enum.Enum):
    """What became of the run; the value is how its page says it."""

    RUNNING = "Running"
    FINISHED = "Finished"
    FAILED = "Failed"
    SAVED = "Stopped by a signal"
    HUNG = "Hung"
    STOPPED = "Stopped"


@dataclass(frozen=True)
class RunFiles:
    """A run folder's content.

    about: run.json. problem: why that could not be read. rows: of metrics.jsonl, steps alone; history: (step, number) of each evaluation
    during the run and at its end, by path. final: evaluation.json, whose numbers `scores` has.
    """

    folder: Path
    about: Mapping[str, Any]
    problem: str
    rows: Sequence[Mapping[str, Any]]
    history: Mapping[str, tuple[tuple[int, float], ...]]
    final: Mapping[str, Any]
    final_problem: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The recipe as run.json has it, unchecked."""
        return _mapping(self.about.get("recipe"))

    def section(self, name: str) -> Mapping[str, Any]:
        return _mapping(self.settings.get(name))

    @cached_property
    def recipe(self) -> Recipe | str:
        """The recipe, or why this version of megakd does not read it."""
        try:
            return recipes.load(str(self.folder / RUN), to_compare=True)[0]
        except ValueError as error:
            return clean(str(error))

    @property
    def name(self) -> str:
        """The folder's."""
        return clean(self.folder.absolute().name)

    @property
    def steps(self) -> int | None:
        """That the recipe asks for."""
        return steps if type(steps := self.section("optim").get("steps")) is int and steps > 0 else None

    @property
    def step(self) -> int:
        """The last one that is known."""
        last_score = max((points[-1][0] for points in self.history.values()), default=0)
        return max(self.rows[-1]["step"] if self.rows else 0, last_score)

    @property
    def starts(self) -> list[Mapping[str, Any]]:
        jobs = self.about.get("jobs")
        return [job for job in jobs if isinstance(job, Mapping)] if isinstance(jobs, list) else []

    @property
    def resumed_at(self) -> list[int]:
        """Steps at which later starts went on, of those that noted it."""
        found = {step for start in self.starts[1:] if type(step := start.get("from_step")) is int}
        return sorted(step for step in found if 0 < step < (self.steps or math.inf))

    @property
    def end(self) -> Mapping[str, Any]:
        """How the last start ended; empty where it noted nothing, as one that was killed."""
        return _mapping(self.starts[-1].get("ended")) if self.starts else {}

    @property
    def has_results(self) -> bool:
        return any((self.folder / name).exists() for name in (MODEL, BUNDLE))

    @property
    def has_sets(self) -> bool:
        """Whether the recipe names something to be scored on."""
        return any(self.section("evaluation").get(kind) for kind in KINDS)

    @cached_property
    def state(self) -> State:
        if held(self.folder):
            return State.RUNNING
        how = self.end.get("how")
        if how == FAILED:
            return State.FAILED
        if how == SAVED:
            return State.SAVED
        if next((self.folder / HUNG).glob("rank_*"), None) is not None:
            return State.HUNG
        whole = self.has_results and (self.steps is None or self.step >= self.steps or not self.rows)
        return State.FINISHED if whole and (self.scores or not self.has_sets) else State.STOPPED

    @cached_property
    def last_words(self) -> str:
        """Of a run that did not come to its end: what it said, else the end of its log."""
        words = self.end.get("words")
        if isinstance(words, str) and words:
            return words
        log = self.starts[-1].get("log") if self.starts else None
        if self.state in (State.FINISHED, State.RUNNING, State.SAVED) or not isinstance(log, str):
            return ""
        try:
            with Path(log).open("rb") as file:
                file.seek(max(0, Path(log).stat().st_size - _LOG_BYTES))
                lines = [line for line in clean(file.read().decode(errors="replace")).splitlines() if line.strip()]
        except (OSError, ValueError):
            return ""
        return "\n".join(lines[-_LOG_LINES:])

    def series(self, *keys: str) -> list[tuple[int, float]]:
        """(step, value) of a number of the rows, by its key, or by a group's and its own."""
        found = []
        for row in self.rows:
            value: Any = row
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            if (known := number(value)) is not None:
                found.append((row["step"], known))
        return found

    def groups(self, key: str) -> list[str]:
        """Names in a group of the rows, in their order."""
        return list(dict.fromkeys(name for row in self.rows for name in _mapping(row.get(key))))

    def weight(self, loss: str, row: Mapping[str, Any]) -> float | None:
        """By which a row's loss was counted; None where the recipe does not tell."""
        key = _OF_ANSWERS.get(loss, f"objectives.{loss}")
        scheduled = number(_mapping(row.get("scheduled")).get(key))
        return scheduled if scheduled is not None else number(self._flat.get(key))

    @cached_property
    def _flat(self) -> dict[str, Any]:
        return texts.flat(self.settings)

    @property
    def samples_in_a_step(self) -> int:
        """Pairs and questions that one step takes together, as the recipe says."""
        if isinstance(self.recipe, str):
            return 0
        return self.recipe.questions_in_a_step() + (self.recipe.optim.batch if self.recipe.active() else 0)

    @property
    def dropped(self) -> dict[str, int]:
        """Samples that could not be used, by reason: each start counts anew, so that the last counts of all starts are added."""
        found: dict[str, int] = {}
        before: Mapping[str, Any] = {}
        for row in [*self.rows, {}]:
            now = _mapping(row.get("bad_samples"))
            began_anew = not row or row["step"] - 1 in self._first_steps or any(_count(now, key) < _count(before, key) for key in before)
            if began_anew:
                for reason in before:
                    found[reason] = found.get(reason, 0) + _count(before, reason)
            before = now
        return {reason: count for reason, count in found.items() if count}

    @cached_property
    def _first_steps(self) -> set[int]:
        return set(self.resumed_at)


def read(folder: Path) -> RunFiles:
    """The content of a run folder."""
    content = json_object(folder / RUN)
    about, problem = ({}, content) if isinstance(content, str) else (cleaned(content), "")
    try:
        rows = read_metrics(folder) if (folder / METRICS).exists() else []
    except OSError as error:
        rows, problem = [], problem or f"{folder / METRICS}: cannot be read ({error})"
    scored = json_object(folder / EVALUATION) if (folder / EVALUATION).exists() else {}
    final, final_problem = ({}, scored) if isinstance(scored, str) else (cleaned(scored), "")
    try:
        numbers = {path: value for path, value in report.numbers(final).items() if math.isfinite(value)}
    except (RecursionError, TypeError, AttributeError) as error:
        numbers, final_problem = {}, f"{folder / EVALUATION}: {error}"
    steps = [cleaned(row) for row in rows if "loss" in row and losses_of(row)]
    return RunFiles(folder, about, problem, steps, scores_by_step(rows), final, final_problem, numbers)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(counts: Mapping[str, Any], key: str) -> int:
    return value if type(value := counts.get(key)) is int else 0
