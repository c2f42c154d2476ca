"""Time and memory of each objective's loss and gradient at a batch, by the ways to compute it, beside open_clip's distillation loss.

Embeddings are random; heads are the objectives' own, and so are their gradients. What the towers cost is not in it.
Legend: N pairs, D embedding width.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from open_clip import DistillClipLoss
from rich.table import Table
from torch import Tensor

from megakd.benchmarks.common import comparison
from megakd.models.embeddings import Embeddings
from megakd.models.heads import ModelShape
from megakd.models.patches import Patches, Read, feature_name
from megakd.models.student import embeddings, normalised
from megakd.objectives.set import ObjectiveSet, weighted_sum
from megakd.planning.memory_tracker import MemoryTracker
from megakd.recipe import Objectives, Recipe
from megakd.recipe.objectives import declaration
from megakd.runtime import environment
from megakd.runtime.console import plain

OPEN_CLIP = "open_clip's distillation loss"
BOTH = "contrastive + similarity"  # what open_clip's computes, in one call
BACKENDS = ("eager", "chunked")
ANGLES = 1024  # pairs; the angles of `rkd` cost their cube
WIDTHS = 512, 768  # of the student, ViT-B's, and of the teacher, ViT-L's
BLOCKS: tuple[dict[Read, Patches], ...] = {-2: Patches(16, 192, (4, 4))}, {-2: Patches(16, 256, (4, 4))}


@dataclass
class Row:
    """seconds: of each round's loss and gradient; bytes: most that was held beside the embeddings."""

    pairs: int
    objective: str
    backend: str
    bytes: int = 0
    seconds: list[float] = field(default_factory=list)


def run(pairs: list[int], rounds: int, only: list[str], file: Path | None = None) -> list[Row]:
    """Measure on the GPU, or on the CPU where there is none; print a table for each batch and a line of JSON.

    only: names of objectives, all of them where it is empty. Raises ValueError for an unknown one.
    """
    names = [BOTH, *Objectives.model_fields]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"--only {unknown[0]}: no objective is called so; there are {', '.join(names)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    for count in pairs:
        rows += measure(count, rounds, [name for name in names if not only or name in only], device)
        plain().print(_table([row for row in rows if row.pairs == count], count))
    where = comparison.conditions(environment.versions(("torch", "open_clip_torch")), torch.get_num_threads())
    where["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    settings = {"pairs": pairs, "rounds": rounds, "widths": WIDTHS, "patches": 16}
    shown = [{**vars(row), "milliseconds": 1e3 * median(row.seconds)} for row in rows]
    comparison.record({"benchmark": "bench objectives", "rows": shown, "settings": settings, **where}, file)
    return rows


def measure(pairs: int, rounds: int, names: list[str], device: torch.device) -> list[Row]:
    """One row for each objective and backend, open_clip's first. They take turns, because machines are noisy in phases."""
    teacher = _models(pairs, device, seed=1, width=WIDTHS[1], learns=False)
    steps: list[tuple[Row, Callable[[], Tensor]]] = [(Row(pairs, OPEN_CLIP, "eager"), _open_clips(pairs, device, teacher))]
    for name in names:
        for backend in BACKENDS:
            step, used = _ours(pairs, device, name, backend, teacher)
            if used is None and backend != BACKENDS[0]:  # one way to compute it
                continue
            steps.append((Row(pairs, name, used or "torch"), step))
    for number in range(rounds + 1):
        for row, step in steps:
            gc.collect()
            if not number:  # the first round warms up, and is counted
                row.bytes = _most_held(step, device)
                continue
            began = _now(device)
            step().backward()  # type: ignore[no-untyped-call]
            row.seconds.append(_now(device) - began)
    return [row for row, _ in steps]


def _ours(pairs: int, device: torch.device, name: str, backend: str, teacher: Embeddings) -> tuple[Callable[[], Tensor], str | None]:
    """The weighted loss of one step as the trainer computes it, and what computes it; None where the loss has one way alone."""
    weights = {"contrastive": 1.0, "similarity": 1.0} if name == BOTH else {name: 1.0}
    recipe = Recipe.model_validate({
        "name": "bench-objectives", "data": {"train": "none"}, "student": {"model": "ViT-B-32"}, "teacher": {"model": "ViT-L-14"},
        "optim": {"steps": 1, "batch": pairs, "lr": 1e-3}, "kernels": {"backend": backend}, "objectives": weights,
        "rkd": {"angle": 50.0 if pairs <= ANGLES else 0.0},
    })  # fmt: skip
    objectives = ObjectiveSet(recipe, device, None)
    width = WIDTHS[1] if name != BOTH and declaration(name).one_width else WIDTHS[0]
    with device:
        heads = objectives.heads(ModelShape(width, BLOCKS[0]), [ModelShape(WIDTHS[1], BLOCKS[1])])
    student = _models(pairs, device, seed=2, width=width, learns=True)
    maps = {block: student.features[feature_name(block)] for block in BLOCKS[0]}

    def step() -> Tensor:
        outputs = {"image": student.image, "text": student.text, "scale": student.scale, "bias": student.bias}
        for key, head in heads.items():
            read = (teacher.image, teacher.text) if head.teacher_width else None
            made = head.project(student.image, student.text, maps, read)
            outputs |= {f"{key}.{output}": value for output, value in made.items()}
        return weighted_sum(objectives.losses(embeddings(outputs), [teacher]), objectives.weights)  # type: ignore[arg-type]

    return step, next(iter(objectives.backends.values()), None)


def _open_clips(pairs: int, device: torch.device, teacher: Embeddings) -> Callable[[], Tensor]:
    loss = DistillClipLoss()
    student = _models(pairs, device, seed=2, width=WIDTHS[0], learns=True)

    def step() -> Tensor:
        parts = loss(student.image, student.text, student.scale, teacher.image, teacher.text, teacher.scale)
        return parts[0] + parts[1]  # type: ignore[no-any-return]

    return step


def _models(pairs: int, device: torch.device, *, seed: int, width: int, learns: bool) -> Embeddings:
    """Images and texts that are somewhat alike where they are pairs, as a trained model's."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    image_ND = draw(pairs, width)
    tensors = [normalised(image_ND), normalised(image_ND + 2 * draw(pairs, width))]
    tensors += [torch.tensor(30.0, device=device), torch.tensor(-10.0, device=device)]
    block = BLOCKS[0 if learns else 1][-2]
    assert block.grid is not None
    image, text, scale, bias, map_NhwC = (one.requires_grad_(learns) for one in (*tensors, draw(pairs, *block.grid, block.width)))
    return Embeddings(image, text, scale, bias, features={"patches.-2": map_NhwC})


def _most_held(step: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes at the peak of a loss and its gradient, without what was there before and without the gradients themselves."""
    watch = MemoryTracker(device.type)
    with watch:
        step().backward()  # type: ignore[no-untyped-call]
    return watch.peak


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _table(rows: list[Row], pairs: int) -> Table:
    title = f"{pairs} pairs" + (", rkd without angles" if pairs > ANGLES else "")
    made = Table("objective", "computed by", "ms", "MB", "N x N matrices", title=title, title_justify="left")
    for row in rows:
        milliseconds, matrices = 1e3 * median(row.seconds), row.bytes / (4 * pairs**2)
        made.add_row(row.objective, row.backend, f"{milliseconds:.1f}", f"{row.bytes / 1e6:.1f}", f"{matrices:.2f}")
    return made
