"""A study's runs in their order: teachers, a store of each, students, what reads them; each is a command of its own.

A run is finished when its results are there, so that the same command goes on after a kill; how its last try ended is noted beside its log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megakd.data.store.manifest import MANIFEST
from megakd.evaluation.sets import TEXT_SETS, sets_of
from megakd.models import image_only
from megakd.pages.texts import json_object
from megakd.recipe import Recipe, Student, load
from megakd.recipe.chain import LANGUAGE
from megakd.recipe.start import Start
from megakd.runtime.exits import EXIT_SAVED
from megakd.runtime.files import json_sha256
from megakd.runtime.run_folder import BUNDLE, EVALUATION, MODEL
from megakd.study import launcher
from megakd.study.grid import ID, STORE_SEED, Cell, Grid, Teacher, moved, slug
from megakd.study.results import DONE, FAILED, MISSING
from megakd.study.spec import StudySpec, as_overrides

Kind = Literal["teacher", "store", "scores", "student", "readout"]
KINDS: tuple[Kind, ...] = ("teacher", "store", "scores", "student", "readout")


@dataclass(frozen=True)
class Job:
    """name: its folder below the study's. after: names of those whose results it reads. options: a store's number of views, and type."""

    name: str
    kind: Kind
    recipe: Recipe
    after: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def command(self, out: Path) -> str:
        """What does the same by itself, for people; `task.perform` does it in a process of the study."""
        recipe, folder = f"--recipe {self.recipe_file(out)}", out / self.name
        if self.kind == "store":
            views, dtype = self.options
            return f"megakd embed {recipe} --out {folder} --views {views} --dtype {dtype}"
        if self.kind == "scores":
            return f"megakd evaluate {recipe} --out {folder / EVALUATION}"
        return f"python megakd/train.py {recipe} --out {folder}"

    def recipe_file(self, out: Path) -> Path:
        return out / "recipes" / f"{self.name.replace('/', '_')}.json"

    def log(self, out: Path) -> Path:
        return out / "logs" / f"{self.name.replace('/', '_')}.log"

    def note(self, out: Path) -> Path:
        """How its last try ended: {"code", "message", "seconds", "tries"}."""
        return self.log(out).with_suffix(".json")

    def done(self, out: Path) -> bool:
        folder = out / self.name
        if self.kind == "store":
            return (folder / MANIFEST).is_file() and self.noted(out).get("code") == 0
        results = _found(folder / EVALUATION)
        if self.kind == "scores":
            return results.get("sets") == sets_of(self.recipe)
        made = MODEL if self.recipe.active() else BUNDLE
        compared = self.recipe.evaluation.diagnostics.keys() <= results.get("diagnostics", {}).keys()
        return (folder / made).is_dir() and (not is_scored(self.recipe) or (results.get("sets") == sets_of(self.recipe) and compared))

    def noted(self, out: Path) -> dict[str, Any]:
        return _found(self.note(out))

    def state(self, out: Path) -> tuple[str, str]:
        """DONE, FAILED or MISSING of `results`, and the last words of one that failed."""
        if self.done(out):
            return DONE, ""
        noted = self.noted(out)
        failed = noted.get("code") not in (None, 0, EXIT_SAVED)  # a study that was stopped goes on
        return (FAILED, str(noted.get("message", ""))) if failed else (MISSING, "")


def is_scored(recipe: Recipe) -> bool:
    """Whether it names an evaluation set, so that its run writes an evaluation.json."""
    settings = recipe.evaluation.model_dump(exclude_defaults=True)
    return bool(settings.keys() - {"every", "batch", "vqa_batch", "weights", "answer_tokens"})


@dataclass
class Work:
    """jobs: each after those whose results it reads. cells: of each, by its id, the job that trains it and the last that reads it.
    teachers, controls: the same by the name of the row. said: what the study does otherwise than one might expect.
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    cells: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    teachers: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    controls: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def add(self, job: Job) -> str:
        self.jobs[job.name] = job
        return job.name

    def longest_chains(self) -> dict[str, int]:
        """Samples to train on from each job's start to the end of the last that waits for it: what starts first shortens the whole."""
        chains: dict[str, int] = {}
        behind = dict.fromkeys(self.jobs, 0)
        for name, job in reversed(self.jobs.items()):  # each job is after those that it waits for
            trains = job.kind not in ("store", "scores")
            chains[name] = behind[name] + (job.recipe.optim.steps * job.recipe.samples_in_a_step() if trains else 0)
            for before in job.after:
                behind[before] = max(behind[before], chains[name])
        return chains

    def seconds(self, out: Path) -> dict[Kind, list[float]]:
        """How long the runs that are done took, by their kind."""
        took: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
        for job in self.jobs.values():
            if job.done(out) and isinstance(seconds := job.noted(out).get("seconds"), int | float):
                took[job.kind].append(seconds)
        return took


def plan(spec: StudySpec, grid: Grid, out: Path) -> Work:
    """All runs of the study. Raises ValueError for a readout whose recipes do not fit together."""
    work = Work()
    for teacher in grid.teachers.values():
        _train(teacher, work)
    stored = {cell.id: _with_store(spec, cell, grid, work, out) for cell in grid.cells}
    for cell in grid.cells:
        recipe, after = stored[cell.id]
        student = work.add(Job(cell.folder, "student", recipe, after))
        tower = {"model": f"local-dir:{out / student}/{MODEL}"}
        work.cells[cell.id] = (student, _readout(spec, work, out, Path(student).name, int(cell.axes["seed"]), tower, (student,)))
    _controls(spec, grid, work, out)
    return work


def _train(teacher: Teacher, work: Work) -> None:
    """Adds the runs that make a teacher: its own teacher's first."""
    if teacher.recipe is None:
        return
    before: tuple[str, ...] = ()
    if teacher.taught_by is not None:
        _train(teacher.taught_by, work)
        before = (teacher.taught_by.folder,) if teacher.taught_by.recipe is not None else ()
    work.add(Job(teacher.folder, "teacher", teacher.recipe, before))


def _with_store(spec: StudySpec, cell: Cell, grid: Grid, work: Work, out: Path) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe that a cell is trained by, and what has to be there before."""
    if cell.teacher is None:
        return cell.recipe, ()
    teacher = grid.teachers[cell.teacher]
    first = (teacher.folder,) if teacher.recipe is not None else ()
    if why := _no_store(spec, cell):
        if why not in work.said:
            work.said.append(why)
        return cell.recipe, first
    others = [other.recipe for other in grid.cells if other.teacher == cell.teacher and other.axes["data"] == cell.axes["data"]]
    recipe = _store_recipe(cell.recipe, sorted({block for other in others if not _reads_live(other) for block in other.teacher_blocks()}))
    seen = {"train": True, "caption": True, "captions": True, "clean": True}
    shown = recipe.model_dump(mode="json", include={"data": seen, "teacher": True, "patch": True})
    of_data = {
        name: value for name, value in shown["data"].items() if value
    } | recipe.data.as_trained()  # without choices that are not made
    shown = {**shown, "data": of_data, "views": {**recipe.views.policy(), "seed": recipe.views.seed}}
    key = _key([shown, teacher.id, spec.store_views, spec.store_type], out)
    name = f"stores/{slug([cell.teacher, cell.axes['data']])}-{key}"
    if name not in work.jobs:
        options = (str(spec.store_views), spec.store_type)
        work.add(Job(name, "store", recipe, first, options))
    taught = {"teacher.store": str(out / name), "teacher.store_miss": "fail", "views.seed": STORE_SEED}
    return changed(cell.recipe, taught), (*first, name)


def _no_store(spec: StudySpec, cell: Cell) -> str | None:
    """Why a cell's teacher runs in every step, said once; None where its embeddings come from a store."""
    recipe = cell.recipe
    assert recipe.teacher is not None
    if not spec.store:
        return "the study's store = false: teachers run in every step of their students"
    if recipe.ensemble:
        return f"methods.{cell.axes['method']}: several teachers, which a store does not hold: they run in every step"
    if image_only.names_one(recipe.teacher):
        return f"teachers.{cell.teacher}: sees images alone, which a store does not hold: it runs in every step"
    if "attention" in recipe.active() and not recipe.attention.reads_tokens:
        return f"methods.{cell.axes['method']}: reads a tower's own attention, which a store does not hold: teachers run in every step"
    if _reads_live(recipe):
        why = "reads patch tokens, which a store holds with teacher.patch_grid alone"
        return f"methods.{cell.axes['method']}: {why}: teachers run in every step"
    return None


def _reads_live(recipe: Recipe) -> bool:
    """Whether objectives read what no store of this teacher holds."""
    if "attention" in recipe.active() and not recipe.attention.reads_tokens:
        return True
    return bool(recipe.teacher_blocks()) and recipe.teacher is not None and recipe.teacher.patch_grid is None


def _store_recipe(recipe: Recipe, blocks: list[int]) -> Recipe:
    """What `megakd embed` reads for all students of one teacher and data set: the patch tokens of every block that one of them reads."""
    assert recipe.teacher is not None
    settings = recipe.model_dump(mode="json", exclude_none=True, include={"name", "data", "views", "student", "teacher"})
    settings["views"]["seed"] = STORE_SEED
    teacher = {key: value for key, value in settings["teacher"].items() if key not in ("scale", "entropy")}
    settings["teacher"] = teacher if blocks else {key: value for key, value in teacher.items() if key != "patch_grid"}
    learned = {"objectives": {"patch": 1.0}, "patch": {"blocks": blocks}} if blocks else {"objectives": {"similarity": 1.0}}
    optim = recipe.optim.model_dump(mode="json", include={"steps", "batch", "lr", "warmup"})
    return Recipe.model_validate({**settings, **learned, "optim": optim})


def _key(content: Any, out: Path) -> str:
    """A checksum, wherever the study lies."""
    return json_sha256(json.dumps(content, sort_keys=True).replace(f"{out}/", ""))[:ID]


def changed(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with these dotted keys set. Raises ValueError as a recipe's file does."""
    tree = recipe.model_dump(mode="json")
    for key, value in settings.items():
        *sections, last = key.split(".")
        inner = tree
        for section in sections:
            inner = inner[section]
        inner[last] = value
    return Recipe.model_validate(tree)


def _readout(spec: StudySpec, work: Work, out: Path, name: str, seed: int, tower: Mapping[str, Any], after: tuple[str, ...]) -> str | None:
    """Adds the runs that read a tower, and returns the last one's name; None where the study has no readout.

    tower: keys of [student]. after: the run that makes it.
    """
    if spec.readout is None:
        return None
    language: str | None = None  # the run whose language model the others adapt, shared by all towers
    start: str | None = None  # the last run on this tower, from which the next one goes on
    for source in spec.readout.chain:
        overrides = [*moved(spec, source), *as_overrides(spec.readout.set)]
        given = load.load_recipe(source, overrides)
        if given.student is not None:
            # Keys of the recipe's own student do not stay beside the tower's, but for its tokenizer.
            own = {"tokenizer": given.student.tokenizer} if given.student.tokenizer is not None else {}
            overrides += ["student={}", *as_overrides({"student": {**own, **tower}}), f"seed={seed}"]
        if language is not None:
            overrides.append(f"decoder.model={out / language}{LANGUAGE}")
        if start is not None:
            overrides.append(f"decoder.start={out / start}/{BUNDLE}")
        recipe = _without_recipes(load.load_recipe(source, overrides))
        id = f"{slug([recipe.name])}-{_key(recipe.model_dump(mode='json'), out)}"
        before = tuple(run for run in (language, start) if run is not None)
        if given.student is None:
            language = work.add(Job(f"readouts/{id}", "readout", recipe, before))
        else:
            start = work.add(Job(f"readouts/{name}-{id}", "readout", recipe, (*after, *before)))
    return start


def _without_recipes(recipe: Recipe) -> Recipe:
    """What a recipe starts from has been trained by the study."""
    gone = {f"{role}.recipe": None for role in ("student", "decoder") if getattr(recipe, role) is not None}
    return changed(recipe, gone)


def _controls(spec: StudySpec, grid: Grid, work: Work, out: Path) -> None:
    """The rows beside the grid."""
    seeds = sorted({int(cell.axes["seed"]) for cell in grid.cells})
    for teacher in grid.teachers.values():
        scores, tower = _teacher_tower(spec, grid, teacher, work, out) if spec.controls.teachers else (None, None)
        reads: list[str | None] = []
        if tower is not None and spec.readout is not None:
            name, after = Path(teacher.folder).name, (teacher.folder,) if teacher.recipe is not None else ()
            reads = [_readout(spec, work, out, name, seed, tower, after) for seed in (seeds if spec.readout.every_seed else seeds[:1])]
        own = teacher.folder if teacher.recipe is not None else scores
        work.teachers[teacher.name] = (own, reads[0] if len(reads) == 1 else None)
        if len(reads) > 1:  # rows of their own, one a seed
            work.controls |= {f"teacher {teacher.name}'s tower, seed {seed}": (None, run) for seed, run in zip(seeds, reads, strict=True)}
    if spec.controls.random:
        for student in dict.fromkeys(cell.axes["student"] for cell in grid.cells):
            for seed in seeds:
                like = next(cell for cell in grid.cells if cell.axes["student"] == student)
                recipe = changed(like.recipe, {"seed": seed})
                name = f"{slug(['random', student, seed])}-{_tower_id(recipe)}"
                if recipe.student is not None and recipe.student.text_from is not None:
                    raise ValueError(
                        f"controls.random = true: student {student!r} has its teacher's text tower (text_from), and is random nowhere "
                        "without it; set controls.random to false"
                    )
                unlearned = _unlearned(recipe)
                job = work.add(Job(f"controls/{name}", "scores", unlearned)) if is_scored(unlearned) else None
                assert recipe.student is not None
                keys = recipe.student.model_dump(mode="json", exclude_defaults=True, exclude=set(Start.model_fields))
                tower = {**keys, "pretrained": "random"}
                read = _readout(spec, work, out, name, seed, tower, ())
                label = f"random tower, {student}" if len(spec.students) > 1 else "random tower"
                work.controls[f"{label}, seed {seed}"] = (job, read)
    if spec.readout is not None and spec.readout.blind is not None:
        for seed in seeds:
            work.controls[f"blind decoder, seed {seed}"] = (None, _blind(spec, spec.readout.blind, seed, work, out))


def _tower_id(recipe: Recipe) -> str:
    return json_sha256([recipe.model_dump(mode="json", include={"student", "seed"})])[:ID]


def _unlearned(recipe: Recipe) -> Recipe:
    """The recipe of a student that is only scored: as it starts, without a teacher and without weights of parts of it."""
    settings = recipe.model_dump(mode="json", exclude_none=True, include={"name", "seed", "data", "student", "evaluation"})
    settings["student"] = {key: value for key, value in settings["student"].items() if key not in Start.model_fields}
    settings["evaluation"] |= {"diagnostics": {}}
    optim = recipe.optim.model_dump(mode="json", include={"steps", "batch", "lr", "warmup"})
    return Recipe.model_validate({**settings, "objectives": {"contrastive": 1.0}, "optim": optim})


def _teacher_tower(spec: StudySpec, grid: Grid, teacher: Teacher, work: Work, out: Path) -> tuple[str | None, dict[str, Any]]:
    """The job that scores a teacher which is taken as it is, if there are sets, and keys of [student] by which readouts name its tower."""
    if teacher.recipe is not None:
        return None, {"model": f"local-dir:{out / teacher.folder}/{MODEL}"}
    tower = {
        key: teacher.settings[key] for key in ("model", "architecture", "pretrained", "tokenizer", "preprocess") if key in teacher.settings
    }
    like = grid.cells[0].recipe
    recipe = _unlearned(like).model_dump(mode="json", exclude_none=True)
    if image_only.names_one(Student.model_validate(tower)):
        recipe["evaluation"] |= {kind: {} for kind in TEXT_SETS}
    scored = Recipe.model_validate({**recipe, "student": tower})
    return work.add(Job(teacher.folder, "scores", scored)) if is_scored(scored) else None, tower


def _blind(spec: StudySpec, source: str, seed: int, work: Work, out: Path) -> str:
    assert spec.readout is not None
    first = load.load_recipe(spec.readout.chain[0], [*moved(spec, spec.readout.chain[0]), *as_overrides(spec.readout.set)])
    if first.student is not None:
        raise ValueError(
            f"readout.blind: the chain's first recipe, {spec.readout.chain[0]}, has a [student]: a blind decoder starts from one without"
        )
    shared = next(job.name for job in work.jobs.values() if job.kind == "readout" and job.recipe.student is None)
    overrides = [*moved(spec, source), *as_overrides(spec.readout.set), f"seed={seed}", f"decoder.model={out / shared}{LANGUAGE}"]
    recipe = _without_recipes(load.load_recipe(source, overrides))
    return work.add(Job(f"readouts/blind-{_key(recipe.model_dump(mode='json'), out)}", "readout", recipe, (shared,)))


def write(work: Work, out: Path) -> None:
    """The recipe of each job, as `--recipe` reads it."""
    for job in work.jobs.values():
        launcher.write_recipe(job.recipe, job.recipe_file(out))


def _found(path: Path) -> dict[str, Any]:
    """An object in a file; empty where there is none, or a damaged one."""
    content = json_object(path)
    return content if isinstance(content, dict) else {}
