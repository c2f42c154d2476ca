"""Weights and temperatures that move over a run: `[schedules]`, by the dotted names of the keys whose values they stand in for.

A field is schedulable where its type is `ScheduledWeight` or `ScheduledTemperature` of `section.py`; the weights in `[objectives]` all are.
What reads it asks `Recipe.value_at`, or `section_at` for an objective's options, in each step.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megakd.recipe import texts
from megakd.recipe.objectives import Objectives, ObjectiveSections, declaration
from megakd.recipe.optim import Optim
from megakd.recipe.section import SCHEDULED_WEIGHT, NonNegative, Number, Positive, Schedulable, Section


class Schedule(Section):
    """From `start` to `end` between two steps; before and after them the value stays."""

    shape: Literal["constant", "linear", "cosine"] = Field(
        description="linear: by as much in every step; cosine: slow at both ends; constant: start in every step"
    )
    start: Number | None = Field(None, description="value up to from_step; default: what the key itself says")
    end: Number | None = Field(None, description="value from to_step on; linear and cosine need it")
    from_step: NonNegative = Field(0, description="step at which it begins to move; the first step is 0")
    to_step: Positive | None = Field(None, description="step at which it has come to end; default: optim.steps")

    @model_validator(mode="after")
    def _says_where_it_moves(self) -> Schedule:
        moves = [name for name in ("end", "from_step", "to_step") if getattr(self, name) != type(self).model_fields[name].default]
        if self.shape == "constant" and moves:
            raise ValueError(f"a constant schedule does not move: take {', '.join(moves)} out, or set shape to linear or cosine")
        if self.shape != "constant" and self.end is None:
            raise ValueError(f"shape = {self.shape!r} needs the value that it moves to: give `end`")
        return self

    def ends(self, own: float | None) -> tuple[float, float]:
        """Its first and last value. own: the key's, which a schedule without `start` needs."""
        start = own if self.start is None else self.start
        assert start is not None, "schedules were checked against their keys"
        return start, start if self.end is None else self.end

    def at(self, step: int, own: float | None, steps: int) -> float:
        """Its value in the step number `step`, from 0, of a run of `steps`."""
        start, end = self.ends(own)
        last = steps if self.to_step is None else self.to_step
        if step <= self.from_step or step >= last:
            return start if step <= self.from_step else end
        done = (step - self.from_step) / (last - self.from_step)
        return start + (end - start) * (done if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * done)))


class ScheduledSections(ObjectiveSections):
    """The part of a recipe that says what is learned from pairs, how long, and what of it moves meanwhile."""

    schedules: dict[str, Schedule] = Field(
        default_factory=dict, description="of weights and temperatures over the run, by key, such as similarity.temperature"
    )
    optim: Optim

    @field_validator("schedules", mode="before")
    @classmethod
    def _by_dotted_names(cls, given: Any) -> Any:
        """Keys without quotes, which are tables in tables to TOML, as those with."""
        if not isinstance(given, dict):
            return given
        named: dict[str, Any] = {}
        for name, inner in given.items():
            is_group = isinstance(inner, dict) and inner and all(isinstance(value, dict) for value in inner.values())
            found = {f"{name}.{below}": one for below, one in cls._by_dotted_names(inner).items()} if is_group else {name: inner}
            for key, schedule in found.items():  # a part of one may come from --set
                both = isinstance(schedule, dict) and isinstance(named.get(key), dict)
                named[key] = {**named[key], **schedule} if both else schedule
        return named

    @model_validator(mode="after")
    def _schedules_fit_their_keys(self) -> ScheduledSections:
        if not self.schedules:
            return self
        known = schedulable(self)
        for key, schedule in self.schedules.items():
            if key not in known:
                raise ValueError(
                    f"schedules.{key}: this recipe has no weight or temperature of that name; {texts.did_you_mean(key, known)}"
                    f"schedulable are {', '.join(known)}"
                )
            mark, own = known[key]
            if own is None and schedule.start is None:
                raise ValueError(f"schedules.{key}: the key has no value of its own to start from: give `start`")
            for name, value in zip(("start", "end"), schedule.ends(own), strict=True):
                if value < 0 or (mark.above_zero and value == 0):
                    raise ValueError(f"schedules.{key}.{name} = {value:g}: {'above 0' if mark.above_zero else 'at least 0'} at every step")
            if not any(schedule.ends(own)):
                raise ValueError(f"schedules.{key}: 0 in every step; take it out, or give start or end a value above 0")
            last = self.optim.steps if schedule.to_step is None else schedule.to_step
            if schedule.from_step >= last:
                named = "optim.steps" if schedule.to_step is None else "to_step"
                raise ValueError(f"schedules.{key}: from_step = {schedule.from_step} does not come before {named} = {last}")
        return self

    def value_at(self, key: str, step: int) -> float:
        """Of a weight or temperature in the step number `step`, from 0: as scheduled, or the key's own."""
        own: Any = self
        for part in key.split("."):
            own = own[part] if isinstance(own, dict) else getattr(own, part)
        schedule = self.schedules.get(key)
        value: float = own if schedule is None else schedule.at(step, own, self.optim.steps)
        return value

    def section_at(self, name: str, step: int) -> Any:
        """The section `name` with the values of its scheduled keys in the step number `step`."""
        moved = {key.removeprefix(f"{name}."): self.value_at(key, step) for key in self.schedules if key.startswith(f"{name}.")}
        section = getattr(self, name)
        return section.model_copy(update=moved) if moved else section

    def peak(self, key: str) -> float:
        """The largest value of a weight over a run of any length."""
        own = self.value_at(key, 0)
        return max(self.schedules[key].ends(own)) if key in self.schedules else own

    def active(self) -> dict[str, float]:
        """name -> largest weight of the objectives that have a positive one in some step, in the order of `Objectives`."""
        weights = {name: self.peak(f"objectives.{name}") for name in Objectives.model_fields}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def in_need_of_a_teacher(self) -> list[str]:
        """Names of the active objectives that compare the student with a teacher."""
        return [name for name in self.active() if declaration(name).needs_teacher]

    def scheduled(self) -> list[str]:
        """Sentences for people."""
        return [_described(key, schedule, self.value_at(key, 0), self.optim.steps) for key, schedule in self.schedules.items()]


def schedulable(section: Section, prefix: str = "") -> dict[str, tuple[Schedulable, float | None]]:
    """Every key below `section` that can be scheduled, with what it may be and its value."""
    found: dict[str, tuple[Schedulable, float | None]] = {}
    for name, field in type(section).model_fields.items():
        key, value = prefix + name, getattr(section, name)
        marks = [mark for mark in field.metadata if isinstance(mark, Schedulable)]
        if marks or isinstance(section, Objectives):
            found[key] = ((marks or [SCHEDULED_WEIGHT])[0], value)
        tables = {f"{key}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {key: value}
        for table, inner in tables.items():
            if isinstance(inner, Section):
                found |= schedulable(inner, f"{table}.")
    return found


def _described(key: str, schedule: Schedule, first: float, steps: int) -> str:
    start, end = schedule.ends(first)
    if schedule.shape == "constant":
        return f"{key}: {start:g} in every step"
    return f"{key}: {start:g} to {end:g}, {schedule.shape}, from step {schedule.from_step} to {schedule.to_step or steps}"
