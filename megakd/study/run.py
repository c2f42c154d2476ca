"""`megakd study STUDY.toml`: check everything, train what is not there yet, and say where the results are."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from megakd.data.digits import write_digits
from megakd.data.shapes import write_world
from megakd.data.shards import ShardSet
from megakd.evaluation.sets import open_sets, sets_of
from megakd.planning import plan as planner
from megakd.planning.cluster import Cluster
from megakd.recipe import Recipe, texts
from megakd.runtime import files
from megakd.runtime.console import plain
from megakd.runtime.launch import World
from megakd.runtime.locks import FolderLock
from megakd.runtime.run_folder import MODEL
from megakd.study import work as works
from megakd.study.execute import NOT_STARTED, Execution
from megakd.study.grid import Cell, Grid, expand, within
from megakd.study.record import Record
from megakd.study.results import DONE, FAILED
from megakd.study.spec import StudySpec, read
from megakd.study.work import KINDS, Job, Work, changed

_OF_READOUTS = "vqa"  # a kind of score that only runs with [answers] have


def load(
    source: str, out: Path | None, *, small: bool = False, seeds: Sequence[int] | None = None, data: Path | None = None
) -> tuple[StudySpec, Grid, Work, Path]:
    """The study in `source` with its runs and its folder; nothing is written. seeds, data: as `spec.read`.

    Raises ValueError for all that can be known to be wrong.
    """
    spec, name = read(source, seeds=seeds, data=data)
    folder = out or Path("runs") / name
    try:
        grid = expand(spec, folder, small=small)
        work = works.plan(spec, grid, folder)
        _check_scores(spec, grid, work)
        if not small:
            _check_hypotheses(spec, grid)
    except ValueError as error:
        raise ValueError(f"study {source}: {error}") from error
    return spec, grid, work, folder


def run(
    source: str,
    out: Path | None,
    at_once: int,
    *,
    small: bool = False,
    seeds: Sequence[int] | None = None,
    data: Path | None = None,
    command: str | None = None,
) -> int:
    """Run what is not done on this machine. Returns 0 when every run is done, 1 when some have failed, which their rows say.

    command: what goes on with it, for messages; default: `megakd study SOURCE`.
    """
    spec, grid, work, folder = load(source, out, small=small, seeds=seeds, data=data)
    files.check_place(folder, "--out")
    for line in work.said:
        print(line, flush=True)
    with FolderLock(folder, doing="runs this study", remedy="wait for it, or choose another --out"):
        record = Record(spec, grid, work, folder, source, prepare(spec, grid))
        works.write(work, folder)
        record.write()
        print(f"each run says how far it is in {folder}/logs", flush=True)
        start, clock = time.monotonic(), Clock(work, folder, at_once)

        def say(line: str) -> None:
            print(f"{line}{clock.left()}", flush=True)

        def changed(running: set[str]) -> None:
            try:
                record.write(running, execution.failed)
            except OSError as error:  # a full disk, of which the runs' own ends tell
                print(f"{folder}: the state of the study cannot be written: {error}", flush=True)

        execution = Execution(work, folder, at_once, spec.retries, say, changed)
        try:
            failed = execution.run()
        finally:
            changed(set())
    print(f"{len(grid.cells)} cells in {folder}, {time.monotonic() - start:.0f} s; `megakd report {folder}` makes the page", flush=True)
    own = {name: message for name, message in failed.items() if not message.startswith(NOT_STARTED)}
    for name, message in own.items():
        print(f"failed: {name}: {message}")
    if failed:
        again = command or f"megakd study {source}"
        print(f"{len(own)} runs failed, and {len(failed) - len(own)} that need them were not started; `{again}` tries again")
    return 1 if failed else 0


def prepare(spec: StudySpec, grid: Grid) -> dict[str, str]:
    """Write the study's world where it is not there yet, and index every data set. Returns a checksum of each, by its name."""
    if spec.world is not None:
        world = spec.world
        folder, settings = Path(world.folder), world.model_dump(include={"train", "test", "seed", "caption_noise"})
        made = write_world(folder, **settings, hard=world.hard) if world.kind == "shapes" else write_digits(folder, **settings)
        print(f"{world.folder}: " + ("written" if made.written else "there already"), flush=True)
    first = {cell.axes["data"]: cell.recipe for cell in grid.cells}
    for recipe in {sets_of(cell.recipe): cell.recipe for cell in grid.cells}.values():
        open_sets(recipe, World(0, 1, torch.device("cpu")))  # what the runs need at their ends
    return {name: f"{ShardSet.open(recipe.data, 0, 1, lambda: None).signature_of_order:08x}" for name, recipe in first.items()}


def _check_scores(spec: StudySpec, grid: Grid, work: Work) -> None:
    """Raises ValueError for a score that no cell will have."""
    for number, score in enumerate(spec.scores):
        for key, path in (("path", score.path), ("families", score.families)):
            if path is None:
                continue
            kind, _, rest = path.partition("/")
            names = _sets(kind, grid.cells, work)
            if not names:
                given = "the readout's recipes" if kind == _OF_READOUTS else "[evaluation]"
                raise ValueError(f"scores[{number}].{key} = {path!r}: no cell has a score of this kind; {given} name no {kind} set")
            if (name := rest.partition("/")[0]) not in names:
                near = texts.did_you_mean(name, names)
                raise ValueError(f"scores[{number}].{key} = {path!r}: no set is called {name!r}; {near}{kind} sets: {sorted(names)}")
            if key == "families" and path.count("*") != 1:
                raise ValueError(f"scores[{number}].families = {path!r}: write one * in it, in the place of the family's name")


def _sets(kind: str, cells: list[Cell], work: Work) -> set[str]:
    """Names of the sets of this kind that every cell is scored on."""
    of_cells = []
    for cell in cells:
        student, readout = work.cells[cell.id]
        recipes: list[Recipe] = [work.jobs[name].recipe for name in (student, readout) if name is not None]
        tables = [getattr(recipe.evaluation, kind, None) for recipe in recipes]
        of_cells.append({name for table in tables if isinstance(table, dict) for name in table})
    return set.intersection(*of_cells)


def _check_hypotheses(spec: StudySpec, grid: Grid) -> None:
    """Raises ValueError for a hypothesis without cells, and for one whose two sides are the same cells or have none to compare."""
    for number, one in enumerate(spec.hypotheses):
        sides = [(one.method, one.only)] if one.against is None else [(one.method, one.only), (one.against, one.against_only or one.only)]
        found = []
        for (method, part), side in zip(sides, ("method", "against"), strict=False):
            cells = [cell for cell in grid.cells if cell.axes["method"] == method and within(cell.axes, part)]
            if not cells:
                raise ValueError(f"hypotheses[{number}].{side}: the grid has no cells of {method!r} there; see its `only` and [[grid]]")
            found.append({(cell.teacher, cell.axes["seed"], cell.id) for cell in cells})
        if len(found) < 2:
            continue
        first, second = ({(teacher, seed) for teacher, seed, _ in side} for side in found)
        if one.measure == "order_difference" and not first & second:
            raise ValueError(
                f"hypotheses[{number}]: `method` and `against` have no cells of one teacher and seed, which the measure compares"
            )
        shared = first & second or first
        if len({frozenset(entry for entry in side if entry[:2] in shared) for side in found}) == 1:
            raise ValueError(
                f"hypotheses[{number}]: of each teacher and seed that both have, `method` and `against` are the same cells, whose "
                f"difference is 0; name other methods, or another student, steps or data in against_only"
            )


class Clock:
    """How long the rest of a study will take, by the runs that are done."""

    def __init__(self, work: Work, out: Path, at_once: int) -> None:
        self._work, self._out, self._at_once = work, out, at_once

    def left(self) -> str:
        """Such as "; 12 runs and about 31 min left"; empty before the first one is done."""
        seconds = self._work.seconds(self._out)
        left = Counter(job.kind for job in self._work.jobs.values() if not job.done(self._out))
        known = [took for times in seconds.values() for took in times]
        if not left or not known:
            return ""
        # A kind of which none is done yet is taken for as long as the others.
        mean = {kind: statistics.mean(times or known) for kind, times in seconds.items()}
        rest = sum(count * mean[kind] for kind, count in left.items()) / self._at_once
        return f"; {sum(left.values())} runs and about {spelled(rest)} left"


def spelled(seconds: float) -> str:
    """Seconds for people: "45 s", "31 min", "2.4 h"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def dry_run(source: str, out: Path | None, cluster: Cluster, *, small: bool = False) -> None:
    """Print what the study would run, what of it is done, and what that costs by the planner. Nothing is written."""
    spec, grid, work, folder = load(source, out, small=small)
    table = Table(
        title=f"{spec.title}: {len(grid.cells)} cells in {folder}",
        caption=f"time: of all of them by `megakd plan`, one {cluster.kind} a run",
    )
    for heading in ("runs", "there", "failed", "to do", "time to do"):
        table.add_column(heading, justify="left" if heading == "runs" else "right")
    hours: dict[str, float] = {}
    for kind in KINDS:
        jobs = [job for job in work.jobs.values() if job.kind == kind]
        states = Counter(job.state(folder)[0] for job in jobs)
        left = [job for job in jobs if not job.done(folder)]
        costs = [_hours(job, work, folder, cluster, hours) for job in left if kind not in ("store", "scores")]
        known = [cost for cost in costs if cost is not None]
        if jobs:
            shown = (spelled(3600 * sum(known)) if known else "") + (
                f" and {len(costs) - len(known)} unknown" if len(known) < len(costs) else ""
            )
            table.add_row(f"{kind}s".replace("scoress", "scores"), str(states[DONE]), str(states[FAILED]), str(len(left)), shown)
    plain().print(table)
    first = [job.name for job in work.jobs.values() if job.kind in ("teacher", "store") and not job.done(folder)]
    if first:
        print("first: " + ", ".join(first))
    for axis in ("teacher", "student", "method", "steps", "data", "seed"):
        print(f"{axis}: " + ", ".join(map(str, spec.axis(axis))))
    for line in work.said:
        print(line)
    for cell in grid.cells:
        state, message = work.jobs[work.cells[cell.id][0]].state(folder)
        print(f"{cell.id} {state:8}{cell}" + (f": {message.splitlines()[0]}" if message else ""))


def _hours(job: Job, work: Work, folder: Path, cluster: Cluster, known: dict[str, float]) -> float | None:
    """Of all steps, by the planner; None for what it cannot know before earlier runs are there. known: by what the costs depend on."""
    recipe = _with_source(job.recipe, work, folder)
    key = files.json_sha256(recipe.model_dump(mode="json", exclude={"seed", "name", "data", "evaluation"}))
    if key not in known:
        try:
            planned = planner.plan(recipe, recipe.name, None, cluster)
        except ValueError:
            if job.kind != "readout":  # whose decoder's tokenizer is made by an earlier run
                raise
            return None
        row = next(row for row in planned.rows if row.mode.name == planned.asked)
        known[key] = row.seconds.total * recipe.optim.steps / 3600
    return known[key]


def _with_source(recipe: Recipe, work: Work, folder: Path) -> Recipe:
    """The recipe with a teacher that the study has not trained yet described as the one that it will train."""
    teacher = recipe.teacher
    if teacher is None or teacher.model is None:
        return recipe
    trained = {f"local-dir:{folder / job.name}/{MODEL}": job for job in work.jobs.values() if job.kind == "teacher"}
    job = trained.get(teacher.model)
    if job is None or job.done(folder) or job.recipe.student is None:
        return recipe
    source = job.recipe.student.model_dump(mode="json", include={"model", "architecture", "pretrained", "tokenizer", "preprocess"})
    return changed(recipe, {f"teacher.{key}": value for key, value in source.items()})
