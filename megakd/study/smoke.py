"""`megakd smoke`: the main job at the size of a laptop, and the student with KD compared with the one without.

1. Write the shapes world: clean pairs for the teacher, and other pairs half of whose captions are wrong, as on the web.
2. Train the teacher, then for each seed the student with KD and the same student without: same data, steps and seed.
3. Print the table. Every run is an ordinary one, started through the deepspeed launcher, and may be resumed.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from megakd.data.shapes import write_world
from megakd.runtime.console import plain
from megakd.runtime.run_folder import EVALUATION, MODEL, read_metrics
from megakd.study import launcher

TRAIN_PAIRS, TEST_PAIRS, CAPTION_NOISE = 20000, 2000, 0.5
WITHOUT_KD = "objectives.similarity=0.0"


def run(seeds: int, out: Path, data: Path) -> int:
    """Run everything that is not done yet, print the table, write OUT/table.json. Returns 0, or the code of the run that failed."""
    start = time.perf_counter()
    make_world(data, TRAIN_PAIRS, TEST_PAIRS)
    teacher = out / "teacher"
    jobs = {teacher: ("smoke_teacher", ["seed=0"])}
    for seed in range(seeds):
        student = [f"seed={seed}", f"teacher.model=local-dir:{teacher / MODEL}"]
        jobs[out / f"kd_seed{seed}"] = ("smoke", student)
        jobs[out / f"no_kd_seed{seed}"] = ("smoke", [*student, WITHOUT_KD])
    for folder, (recipe, overrides) in jobs.items():
        if code := launcher.run(recipe, folder, [*overrides, *launcher.moved(recipe, data)], "megakd smoke"):
            return code
    kinds = {"teacher": ["teacher"]}
    kinds |= {name: [f"{kind}_seed{seed}" for seed in range(seeds)] for name, kind in (("student, KD", "kd"), ("student, no KD", "no_kd"))}
    rows = [{"model": name, "runs": [_scores(out / folder) for folder in folders]} for name, folders in kinds.items()]
    (out / "table.json").write_text(json.dumps({"rows": rows, "seeds": seeds}, indent=1) + "\n", encoding="utf-8")
    _show(rows, seeds, time.perf_counter() - start)
    return 0


def make_world(data: Path, train: int, test: int) -> None:
    """Write the shapes world to `data` unless it is there."""
    world = write_world(data, train=train, test=test, caption_noise=CAPTION_NOISE)
    print(f"{data}: " + (f"written in {world.seconds:.1f} s" if world.written else "there already"), flush=True)


def _scores(folder: Path) -> dict[str, float]:
    scores = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    retrieval = scores["retrieval"]["test"]
    speeds = [row["images_per_second"] for row in read_metrics(folder) if "images_per_second" in row]
    return {
        "zero_shot": scores["zero_shot"]["seen"]["top1"],
        "image_to_text_R@1": retrieval["image_to_text"]["R@1"],
        "image_to_text_R@5": retrieval["image_to_text"]["R@5"],
        "text_to_image_R@1": retrieval["text_to_image"]["R@1"],
        "text_to_image_R@5": retrieval["text_to_image"]["R@5"],
        "mean_R@1": retrieval["mean_R@1"],
        "parameters": scores["parameters"],
        "images_per_second": statistics.median(speeds),
    }


COLUMNS = {
    "zero_shot": "zero-shot top-1",
    "image_to_text_R@1": "image to text R@1",
    "image_to_text_R@5": "R@5",
    "text_to_image_R@1": "text to image R@1",
    "text_to_image_R@5": "R@5",
    "mean_R@1": "mean R@1",
}


def _show(rows: list[dict[str, Any]], seeds: int, seconds: float) -> None:
    repeated = f"{seeds} seeds" if seeds > 1 else "1 seed"
    title = f"{TEST_PAIRS} test pairs; {CAPTION_NOISE:.0%} of the students' captions are wrong; {repeated}; {seconds:.0f} s"
    table = Table(title=title, caption="images/s: training throughput, teacher's forward included")
    table.add_column("model")
    for heading in (*COLUMNS.values(), "parameters", "images/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [percent([run[key] for run in row["runs"]]) for key in COLUMNS]
        speed = statistics.median(run["images_per_second"] for run in row["runs"])
        table.add_row(row["model"], *cells, f"{row['runs'][0]['parameters'] / 1e6:.2f} M", f"{speed:.0f}")
    plain().print(table)
    with_kd, without = (next(row["runs"] for row in rows if row["model"] == name) for name in ("student, KD", "student, no KD"))
    for key, name in (("zero_shot", "zero-shot top-1"), ("mean_R@1", "mean R@1")):
        gains = [with_run[key] - without_run[key] for with_run, without_run in zip(with_kd, without, strict=True)]
        print(f"gain from KD, {name}: " + ", ".join(f"{gain:+.1%}" for gain in gains) + (" (by seed)" if seeds > 1 else ""))


def percent(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1%}"
    return f"{statistics.mean(values):.1%} ± {statistics.stdev(values):.1%}"
