"""`megakd diagnose RUN`: a finished run's student beside its teacher, or beside any other, on pairs of one's choice."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from megakd.data.shards import ShardSet
from megakd.evaluation.diagnostics.compare import Shown, compare
from megakd.evaluation.run import process_group, recipe_of, student_of
from megakd.evaluation.sets import open_sets
from megakd.export.trained import newest
from megakd.models import clip
from megakd.models.pretrained import LOCAL
from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from megakd.recipe.best import EMA
from megakd.recipe.chain import CLIP_CONFIG
from megakd.recipe.evaluation import Evaluation
from megakd.runtime import collectives, run_folder, watchdog
from megakd.runtime.console import plain
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.teachers import build
from megakd.teachers.base import LiveTeacher, settings_of

FILE = "diagnostics.json"
_COUNTS = ("pairs", "repeated", "unreadable")


def diagnose_run(run: Path, chosen: Path | None, teacher: str | None, overrides: Sequence[str]) -> None:
    """The numbers of `compare`, written to RUN/diagnostics.json and printed. Ranks that torchrun started share the pairs.

    chosen: a checkpoint's folder; default: the newest valid one. teacher: a model, as teacher.model names one, in place of the recipe's.
    Raises ValueError where there is no teacher or no set of pairs, and as `megakd evaluate` and training do for what cannot be loaded.
    """
    # A JSON string is one of TOML as well.
    named = [] if teacher is None else [f"teacher={{ model = {json.dumps(_named(teacher))} }}", "ensemble={}"]
    with process_group() as world:
        recipe = recipe_of(run, [*named, *overrides])
        for role, settings in recipe.teachers().items():
            recipes.check_given(settings, str(run / run_folder.RUN), f"{role}.")
        if recipe.teacher is None:
            raise ValueError(f"{run}: its recipe has no [teacher]; give one with --teacher MODEL")
        if not recipe.evaluation.diagnostics:
            raise ValueError(f"{run}: its recipe names no pairs to compare on; add some with --set evaluation.diagnostics.NAME=SHARDS")
        alone = Evaluation(diagnostics=recipe.evaluation.diagnostics, batch=recipe.evaluation.batch)
        sets = open_sets(recipe.model_copy(update={"evaluation": alone}), world).diagnostics
        described = {role: clip.resolve(settings, role) for role, settings in recipe.weighted_teachers().items()}
        path = collectives.by_main(lambda: chosen or newest(run), world)
        step, encoder = student_of(recipe, path, world, averaged=recipe.evaluation.weights == EMA)
        visual: Any = getattr(encoder.clip, "visual", None)
        say: Callable[[str], None] = print if world.is_main else lambda _: None
        teachers = {role: Shown.beside(visual, one, _load(recipe, one, world, say), encoder.batch, say) for role, one in described.items()}
        found = compare(sets, encoder, teachers, world, recipe.data.workers, StopPoller(world))
        names = {role: one.settings.model or "own architecture" for role, one in described.items()}
        if world.is_main:
            run_folder.write_json(run / FILE, {"step": step, "checkpoint": str(path), "teachers": names, "diagnostics": found})
            console = plain()
            console.print(f"{path}, step {step}, beside {', '.join(names.values())}", markup=False)
            for table in tables(found):
                console.print(table)
            console.print(f"written to {run / FILE}", markup=False)


def _named(teacher: str) -> str:
    """A folder as teacher.model names it: a run's, its model, or another that open_clip loads; anything else as it is."""
    folder = Path(teacher)
    if not folder.is_dir():
        return teacher
    return f"{LOCAL}{folder if (folder / CLIP_CONFIG).is_file() else folder / run_folder.MODEL}"


def _load(recipe: Recipe, description: clip.ModelSpec, world: World, say: Callable[[str], None]) -> LiveTeacher:
    """As training loads it; one in 8 bit is compared with 16 bit, and calibrated, on the recipe's training set. A collective."""
    watchdog.beat(f"loading {description.role}")
    if not settings_of(description).int8:
        torch.manual_seed(recipe.seed + 1)  # of random weights, as `live_teacher`
        return build.load(description, world)
    shards = ShardSet.open(recipe.data, world.rank, world.size, lambda: collectives.barrier(world), captions=description.has_text)
    return build.live_teacher(recipe, description, world, shards, piece=recipe.evaluation.batch, say=say)


def tables(found: Mapping[str, Any]) -> list[Table]:
    """A table for each set and teacher: what each model has alone, then what they have in common."""
    made = []
    for name, of in found.items():
        by_role = {role: numbers for role, numbers in of.items() if isinstance(numbers, Mapping)} or {"teacher": of}
        for role, numbers in by_role.items():
            left = [f"{of[why]} {why}" for why in ("repeated", "unreadable") if of[why]]
            title = f"{name}: {of['pairs']} pairs" + (f" ({', '.join(left)} left out)" if left else "")
            table = Table("", title=title, box=None, title_justify="left")
            for heading in ("student", role, "both"):
                table.add_column(heading, justify="right")
            single = dict.fromkeys(key.partition("_")[2] for key in numbers if key.startswith(("student_", "teacher_")))
            for key in single:
                table.add_row(key, *(_shown(numbers.get(f"{whose}_{key}")) for whose in ("student", "teacher")), "")
            for key, value in numbers.items():
                if key not in _COUNTS and not key.startswith(("student_", "teacher_")):
                    table.add_row(key, "", "", _shown(value))
            made.append(table)
    return made


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
