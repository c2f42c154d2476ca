"""`megakd smoke --vqa`: what a language model can read from each vision tower, at the size of a laptop.

1. Write the shapes world; train the teacher, the student with KD and the same student without, and a tiny decoder that can read.
2. For each tower, a random one included: align a projector on captions, then adapt the decoder by LoRA on questions. The tower stays.
3. The same decoder without a tower (blind) shows what the questions give away, the random tower what a projection of the pixels gives.

Every run is an ordinary one: OUT/recipes/ holds its recipe, derived from a shipped one, which names the recipes that come before it.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from megakd.runtime.console import plain
from megakd.runtime.run_folder import EVALUATION
from megakd.study import launcher
from megakd.study.recipes import Recipes
from megakd.study.smoke import WITHOUT_KD, make_world, percent

# Eight minutes on two cores: a smaller world than `megakd smoke`'s, and half the steps for its towers, which only answer questions.
TRAIN_PAIRS, TEST_PAIRS = 12000, 1000
NO_SETS = ("evaluation.zero_shot={}", "evaluation.retrieval={}", "evaluation.hard_negatives={}")
TEACHER, STUDENT = ("optim.steps=280", *NO_SETS), ("optim.steps=180", *NO_SETS)
ROWS = ("blind", "random tower", "student, no KD", "student, KD", "teacher's tower")
FAMILIES = ("colour", "shape", "size", "position", "count", "existence", "relation")


def recipe_of(row: str, seed: int, recipes: Recipes) -> tuple[str, Path]:
    """The recipe of a row's last run, which names all that come before it, and that run's folder."""
    name = f"{row.replace(' ', '_').replace(',', '').replace(chr(39), '')}_seed{seed}"
    folder = recipes.out / name
    if row == "blind":
        return recipes.blind(name, seed), folder
    teacher = recipes.derive("smoke_teacher", "teacher", *TEACHER)
    if row == "teacher's tower":
        return recipes.readout(name, seed, recipes.trained("student", "teacher", teacher)), folder
    if row == "random tower":
        return recipes.readout(name, seed, (*recipes.trained("student", "teacher", teacher), "student.pretrained=random")), folder
    kind, without = ("kd", ()) if row == "student, KD" else ("no_kd", (WITHOUT_KD,))
    learned = (f"seed={seed}", *recipes.trained("teacher", "teacher", teacher), *STUDENT, *without)
    student = recipes.derive("smoke", f"{kind}_seed{seed}", *learned)
    return recipes.readout(name, seed, recipes.trained("student", f"{kind}_seed{seed}", student)), folder


def run(seeds: int, out: Path, data: Path) -> int:
    """Run everything that is not done yet, print the table, write OUT/table.json. Returns 0, or the code of the run that failed."""
    start = time.perf_counter()
    make_world(data, TRAIN_PAIRS, TEST_PAIRS)
    recipes = Recipes(out, data)
    scores: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for seed in range(seeds):
        # The teacher's row first: the students' recipes need the teacher.
        for row in ("blind", "teacher's tower", "random tower", "student, no KD", "student, KD"):
            recipe, folder = recipe_of(row, seed, recipes)
            if code := launcher.run(recipe, folder, [], "megakd smoke --vqa"):
                return code
            scores[row].append(json.loads((folder / EVALUATION).read_text(encoding="utf-8"))["vqa"])
    (out / "table.json").write_text(json.dumps({"seeds": seeds, "rows": scores}, indent=1) + "\n", encoding="utf-8")
    _show(scores, seeds, time.perf_counter() - start)
    return 0


def _show(scores: dict[str, list[dict[str, Any]]], seeds: int, seconds: float) -> None:
    questions = next(iter(scores.values()))[0]["test"]["questions"]
    repeated = f"{seeds} seeds" if seeds > 1 else "1 seed"
    title = f"VQA accuracy on {questions} questions, {repeated}, {seconds:.0f} s"
    table = Table(title=title, caption="held-out: scenes of pairs never seen in training")
    for heading in ("vision tower", "overall", *FAMILIES, "held-out"):
        table.add_column(heading, justify="left" if heading == "vision tower" else "right")
    for row, runs in scores.items():
        families = [percent([run["test"]["by_family"][family]["accuracy"] for run in runs]) for family in FAMILIES]
        table.add_row(row, percent(_overall(runs, "test")), *families, percent(_overall(runs, "held_out")))
    plain().print(table)
    for lower, upper in itertools.pairwise(ROWS):
        gains = [high - low for low, high in zip(_overall(scores[lower], "test"), _overall(scores[upper], "test"), strict=True)]
        print(f"{upper} over {lower}: " + ", ".join(f"{gain:+.1%}" for gain in gains) + f" (mean {statistics.mean(gains):+.1%})")


def _overall(runs: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float(run[name]["accuracy"]) for run in runs]
