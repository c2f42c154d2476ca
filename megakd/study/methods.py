"""`megakd study`: objectives compared on the shapes world, by the student's own scores and by what a decoder reads from its tower.

methods  every objective beside InfoNCE, from one teacher, against no KD
patches  `similarity` and `similarity` with `patch`, from three teachers of unlike strength: does the student's VQA rise with the teacher's?

The world and the schedules are those of `megakd smoke --vqa`. A cell is a student and then its readout, ordinary runs of one rank under
OUT/METHOD_TEACHER_seedN; both studies share their cells. Weights are the papers' where they carry over to this size, else 1: none is tuned.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.runtime.run_folder import EVALUATION
from megakd.study import launcher
from megakd.study.recipes import Recipes
from megakd.study.smoke import make_world, percent
from megakd.study.smoke_vqa import FAMILIES, TEST_PAIRS, TRAIN_PAIRS

STEPS = 180  # of a student
TEACHERS = {"weak": 70, "middle": 280, "strong": 1000}  # steps of training; all of the student's architecture, so that no head is between
NO_KD = "no KD"
# CLIP-KD's weight of 2000 for a mean over D = 64 widths is 2000 * 2 / 64 of the sum that `feature` is.
FEATURE = 62.5
ATTENTION = 111.0  # attention transfer's 1,000 for a mean over V = 9 patches is 1,000 / 9 of the sum that `attention` is
METHODS: dict[str, dict[str, Any]] = {
    NO_KD: {},
    "similarity": {"objectives.similarity": 1.0},
    "similarity, matched scale": {"objectives.similarity": 1.0, "teacher.scale": "matched"},
    "standardised": {"objectives.standardised": 1.0},
    "dkd": {"objectives.dkd": 1.0},
    "dist": {"objectives.dist": 1.0},
    "rkd": {"objectives.rkd": 1.0},
    "gradient": {"objectives.gradient": 1.0},
    "interactive": {"objectives.interactive": 1.0},
    "cross": {"objectives.cross": 1.0},
    "feature": {"objectives.feature": FEATURE},
    "masked_feature": {"objectives.masked_feature": FEATURE},
    "augmented_feature": {"objectives.augmented_feature": 1.0},
    "CLIP-KD": {"objectives.similarity": 1.0, "objectives.interactive": 1.0, "objectives.feature": FEATURE},
    "patch": {"objectives.patch": 1.0},
    "patch_relation": {"objectives.patch_relation": 1.0},
    "attention": {"objectives.attention": ATTENTION},
    "similarity + patch": {"objectives.similarity": 1.0, "objectives.patch": 1.0},
}
WITH_PATCHES = ("similarity", "similarity + patch")


@dataclass(frozen=True)
class Cell:
    """A student and its readout. method: None is the teacher's own tower."""

    method: str | None
    teacher: str
    seed: int

    @property
    def name(self) -> str:
        """Of the student's run folder; a student without KD has no teacher."""
        if self.method is None:
            return f"teacher_{self.teacher}"
        parts = (self.method, *([] if self.method == NO_KD else [self.teacher]), f"seed{self.seed}")
        return "_".join(parts).replace(", ", "_").replace(" + ", "_").replace(" ", "_")

    @property
    def readout(self) -> str:
        return f"{self.name}_vqa" if self.method is not None else f"{self.name}_vqa_seed{self.seed}"


def cells_of(study: str, seeds: int) -> list[Cell]:
    """The cells of a study, by seed, so that one that is cut short has whole seeds. Raises ValueError for an unknown study."""
    if study == "methods":
        return [Cell(method, "middle", seed) for seed in range(seeds) for method in METHODS]
    if study == "patches":
        rows = (None, *WITH_PATCHES)
        return [Cell(method, teacher, seed) for seed in range(seeds) for teacher in TEACHERS for method in rows]
    raise ValueError(f"no study is called {study}: there are methods and patches")


def run(study: str, seeds: int, out: Path, data: Path, at_once: int) -> int:
    """Run what is not done yet, print the table and write it to OUT/STUDY.md and OUT/STUDY.json. Returns 1 where a run has failed."""
    start = time.perf_counter()
    cells = cells_of(study, seeds)
    make_world(data, TRAIN_PAIRS, TEST_PAIRS)
    recipes = Recipes(out, data)
    # One after another: what several cells start from, then the students, then the readouts.
    teachers = {name: recipes.derive("smoke_teacher", f"teacher_{name}", f"optim.steps={steps}") for name, steps in TEACHERS.items()}
    needed = {cell.teacher for cell in cells}
    shared = [(teachers[name], out / f"teacher_{name}") for name in TEACHERS if name in needed]
    students = {cell: teachers[cell.teacher] if cell.method is None else student_recipe(cell, recipes, teachers) for cell in cells}
    readouts = {cell: recipes.readout(cell.readout, cell.seed, recipes.trained("student", cell.name, students[cell])) for cell in cells}
    stages = [
        [*shared, (recipes.decoder(), out / "decoder")],
        [(students[cell], out / cell.name) for cell in cells if cell.method is not None],
        [(readouts[cell], out / cell.readout) for cell in cells],
    ]
    for jobs in stages:
        if failed := launcher.run_together(jobs, at_once):
            print(f"{len(failed)} runs failed; `megakd study {study}` again goes on from their last checkpoints", flush=True)
            return 1
    lines = write_table(study, cells, out)
    print("", *lines, f"\n{len(cells)} cells, {time.perf_counter() - start:.0f} s; written to {out / study}.md and .json", sep="\n")
    return 0


def write_table(study: str, cells: Sequence[Cell], out: Path) -> list[str]:
    """The lines of a study's table, from the scores of finished cells, which are written to OUT/STUDY.md and OUT/STUDY.json."""
    scores = {cell: _scores(out, cell) for cell in cells}
    lines = _methods(scores) if study == "methods" else _patches(scores)
    (out / f"{study}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [{"method": cell.method, "teacher": cell.teacher, "seed": cell.seed, **scores[cell]} for cell in cells]
    (out / f"{study}.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return lines


def student_recipe(cell: Cell, recipes: Recipes, teachers: dict[str, str]) -> str:
    assert cell.method is not None
    learned = {"objectives.similarity": 0.0, **METHODS[cell.method]}
    overrides = [f"seed={cell.seed}", f"optim.steps={STEPS}", *(f"{key}={value}" for key, value in learned.items())]
    taught = recipes.trained("teacher", f"teacher_{cell.teacher}", teachers[cell.teacher])
    return recipes.derive("smoke", cell.name, *overrides, *taught)


def _scores(out: Path, cell: Cell) -> dict[str, float]:
    own, read = (json.loads((out / folder / EVALUATION).read_text(encoding="utf-8")) for folder in (cell.name, cell.readout))
    answered = read["vqa"]["test"]
    return {
        "zero_shot": own["zero_shot"]["seen"]["top1"],
        "mean_R@1": own["retrieval"]["test"]["mean_R@1"],
        "vqa": answered["accuracy"],
        **{family: answered["by_family"][family]["accuracy"] for family in FAMILIES},
        "held_out": read["vqa"]["held_out"]["accuracy"],
    }


def _methods(scores: dict[Cell, dict[str, float]]) -> list[str]:
    seeds = {cell.seed for cell in scores}
    heads = ("zero-shot", "mean R@1", "VQA", "over no KD, by seed", *FAMILIES, "held-out pairs")
    lines = [f"| {len(seeds)} seeds, mean ± deviation | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for method in METHODS:
        rows = [found for cell, found in scores.items() if cell.method == method]
        plain = [found for cell, found in scores.items() if cell.method == NO_KD]
        gains = [100 * (row["vqa"] - base["vqa"]) for row, base in zip(rows, plain, strict=True)]
        shown = [percent([row[key] for row in rows]) for key in ("zero_shot", "mean_R@1", "vqa")]
        shown.append("" if method == NO_KD else ", ".join(f"{gain:+.1f}" for gain in gains))
        shown += [f"{statistics.mean(row[family] for row in rows):.1%}" for family in FAMILIES]
        lines.append(f"| {method} | " + " | ".join((*shown, percent([row["held_out"] for row in rows]))) + " |")
    return lines


def _patches(scores: dict[Cell, dict[str, float]]) -> list[str]:
    def of(method: str | None, teacher: str, key: str) -> list[float]:
        return [found[key] for cell, found in scores.items() if (cell.method, cell.teacher) == (method, teacher)]

    of_students = [f"student's {key}, {name}" for key in ("VQA", "R@1") for name in WITH_PATCHES]
    heads = ("steps", "zero-shot", "mean R@1", "VQA of its tower", *of_students)
    lines = ["| teacher | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for teacher, steps in TEACHERS.items():
        own = [f"{of(None, teacher, key)[0]:.1%}" for key in ("zero_shot", "mean_R@1")]
        students = [percent(of(name, teacher, key)) for key in ("vqa", "mean_R@1") for name in WITH_PATCHES]
        lines.append(f"| {teacher} | " + " | ".join((str(steps), *own, percent(of(None, teacher, "vqa")), *students)) + " |")
    ranked = sorted(TEACHERS, key=lambda teacher: statistics.mean(of(None, teacher, "vqa")))
    lines += ["", f"Teachers by the VQA of their own towers: {', '.join(ranked)}.", ""]
    for name in WITH_PATCHES:
        by_teacher = [of(name, teacher, "vqa") for teacher in ranked]
        shown = ", ".join(f"{statistics.mean(runs):.1%}" for runs in by_teacher)
        lines.append(f"- {name}: the student's VQA in that order is {shown}: {_order(by_teacher)}.")
    return lines


def _order(by_teacher: Sequence[Sequence[float]]) -> str:
    """Whether the means rise from row to row, and how many pairs of teachers are in order within a seed."""
    means = [statistics.mean(runs) for runs in by_teacher]
    pairs = list(itertools.combinations(range(len(means)), 2))
    ordered = [by_teacher[high][seed] > by_teacher[low][seed] for low, high in pairs for seed in range(len(by_teacher[0]))]
    rises = "it rises" if all(means[low] < means[high] for low, high in pairs) else "it does not rise"
    return f"{rises} with the teacher's ({sum(ordered)} of {len(ordered)} pairs of one seed are in order)"
