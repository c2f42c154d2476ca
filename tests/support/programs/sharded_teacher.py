"""Started on two ranks by test_sharded_teacher.py: `sharded_teacher.py TASK FOLDER`; every rank writes FOLDER/TASK-RANK.json.

FOLDER holds NAME.safetensors for every narrow architecture and `bad.safetensors`, which fits none.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from megakd.models import clip, streaming
from megakd.models.int8 import convert
from megakd.models.int8.migration import Reference, migrate
from megakd.models.student import Student, embeddings
from megakd.models.weights import SafetensorsFiles
from megakd.recipe import Optim
from megakd.runtime import launch, zero3
from megakd.runtime.engine import Engine
from megakd.runtime.launch import World
from megakd.teachers.base import Teacher
from megakd.teachers.replicated import ReplicatedTeacher
from megakd.teachers.sharded import ShardedTeacher
from support.parameter_groups import decay_groups
from support.teachers import ARCHITECTURES, build, describe, inputs

OPTIM = Optim(steps=9, batch=8, lr=1e-3, weight_decay=0.1, clip=0.5)
# bits of the teacher: (stage, accumulation steps) of the student beside it
STUDENTS = {32: ((3, 2),), 8: ((0, 1), (2, 2), (3, 1))}


def config(offload: bool = False) -> dict[str, Any]:
    """Thresholds for narrow towers: blocks are gathered one by one, and vectors are partitioned as well."""
    found = zero3.settings(offload=offload)
    small = {"stage3_max_live_parameters": 60_000, "stage3_prefetch_bucket_size": 20_000, "stage3_param_persistence_threshold": 10}
    found["zero_optimization"] |= small
    return found


def sharded(name: str, folder: Path, world: World, bits: int, *, offload: bool = False, without_text: bool = False) -> ShardedTeacher:
    described, quantised = describe(name, str(folder / f"{name}.safetensors")), streaming.Int8() if bits == 8 else None
    return ShardedTeacher.load(described, world, quantised, without_text=without_text, config=config(offload))


def replicated(name: str, folder: Path, world: World, bits: int) -> ReplicatedTeacher:
    """By the other way: open_clip loads the whole model, and all of it is made int8."""
    built = clip.build(describe(name, str(folder / f"{name}.safetensors")), world.device)
    if bits == 8:
        convert.quantise(built.clip)
    return ReplicatedTeacher(built)


def migrated(teacher: ReplicatedTeacher | ShardedTeacher) -> dict[str, Any]:
    """Move outliers of some pairs into the weights. Returns the factors' digest and what the teacher gave with its original matrices."""
    originals = teacher.towers.originals
    with Reference(originals) as reference:
        reference.noting = True
        teacher.embed(*inputs(8, seed=50))
        reference.noting = False
        expected = teacher.embed(*inputs(4, seed=60))
    return {"digest": migrate(originals, reference.largest, zero3.overwrite), "original": expected.image.tolist()}


def migrations(folder: Path, world: World) -> dict[str, Any]:
    """Migrated teachers, partitioned against whole, and against what they are in 32 bits."""
    found: dict[str, Any] = {}
    int8, (pixels, _) = streaming.Int8(migrated=True), inputs(4, seed=60)
    for name in sorted(ARCHITECTURES):
        described = describe(name, str(folder / f"{name}.safetensors"))
        whole = ReplicatedTeacher(streaming.load(described, world, "fp32", int8=int8))
        plain = whole.embed(*inputs(3)).image
        parts = ShardedTeacher.load(described, world, int8, config=config(offload=name == "SigLIP"))
        first, second = migrated(whole), migrated(parts)
        entry = compare(whole, parts, world)
        entry["changed"] = not torch.equal(plain, whole.embed(*inputs(3)).image)
        entry["digests"] = [first["digest"], second["digest"]]
        exact = replicated(name, folder, world, 32).embed_images(pixels)
        entry["from_exact"] = [float((torch.tensor(side["original"]) - exact).abs().max()) for side in (first, second)]
        entry["after"] = float(F.cosine_similarity(whole.embed_images(pixels), exact).min())
        found[name] = entry
    return found


def compare(one: Teacher, other: Teacher, world: World, batches: int = 3) -> dict[str, Any]:
    """Equality bit for bit over several forwards: DeepSpeed records the order of modules in the first two and prefetches after."""
    equal = []
    for number in range(batches):
        batch = inputs(3 + number, seed=2 * number + world.rank)
        a, b = one.embed(*batch), other.embed(*batch)
        parts = [(a.image, b.image), (a.text, b.text), (a.scale, b.scale)]
        equal.append(all(torch.equal(x, y) for x, y in parts))
        equal.append(a.bias == b.bias if a.bias is not None else b.bias is None)
    return {"equal": all(equal), "widths": [one.width, other.width], "dtypes": [str(one.dtype), str(other.dtype)]}


def read_bytes() -> int:
    return int(psutil.Process().io_counters().read_chars)


def teachers(folder: Path, world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sharded("ViT-bigG", folder, world, 8)  # what is imported late is read now
    for name in sorted(ARCHITECTURES):
        for bits in (32, 8):
            before = read_bytes()
            teacher = sharded(name, folder, world, bits)
            read = read_bytes() - before
            reference = replicated(name, folder, world, bits)
            entry = compare(reference, teacher, world)
            clip: Any = reference.towers.clip
            whole = sum(p.nbytes for key, p in clip.named_parameters() if key not in streaming.SCALARS)
            entry |= {"resident": teacher.resident_bytes, "whole": whole, "read": read}
            found[f"{name}-{bits}"] = entry
        images = sharded(name, folder, world, 8, without_text=True)
        pixels, _ = inputs(4)
        entry["images_alone_equal"] = torch.equal(images.embed_images(pixels), teacher.embed_images(pixels))
        entry["images_alone"] = images.resident_bytes
    found["offload"] = compare(reference, sharded(name, folder, world, 8, offload=True), world)
    return found


def student(world: World, stage: int, accumulation: int) -> Engine:
    torch.manual_seed(0)
    module = Student(build("ViT-bigG", seed=1).requires_grad_(True).train(), {}, 100.0)
    micro = OPTIM.batch // world.size // accumulation
    settings = {
        "train_batch_size": OPTIM.batch, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation,
        "gradient_clipping": OPTIM.clip, "zero_optimization": {"stage": stage}, "steps_per_print": 10**9,
    }  # fmt: skip
    return Engine(module, decay_groups(module, OPTIM.weight_decay), OPTIM, settings, world, None)


def step(engine: Engine, teacher: Teacher, world: World, number: int) -> float:
    """One update towards the teacher's similarities. Returns this rank's loss."""
    total = 0.0
    for piece in range(engine.accumulation):
        pixels, tokens = inputs(engine.micro_batch, seed=100 * number + 10 * piece + world.rank)
        target = teacher.embed(pixels, tokens)
        ours = embeddings(engine.forward(pixels, tokens))
        loss = _difference(ours.image @ ours.text.T, target.image @ target.text.T) / engine.accumulation
        engine.backward(loss)
        total += loss.item()
        if piece + 1 < engine.accumulation:
            engine.accumulated()
    engine.update(OPTIM.lr)
    return total


def _difference(ours: Tensor, theirs: Tensor) -> Tensor:
    return F.mse_loss(ours.float(), theirs.float())


def students(folder: Path, world: World) -> dict[str, Any]:
    linear = F.linear
    found: dict[str, Any] = {}
    for bits, settings in STUDENTS.items():
        sides = {"replicated": replicated("EVA02-E", folder, world, bits), "sharded": sharded("EVA02-E", folder, world, bits)}
        # A ZeRO-3 student has DeepSpeed replace it; a teacher must not.
        found.setdefault("linear_is_torchs", F.linear is linear)
        for stage, accumulation in settings:
            entry: dict[str, Any] = {}
            for side, teacher in sides.items():
                engine = student(world, stage, accumulation)
                losses = [step(engine, teacher, world, number) for number in range(3)]
                weights = engine.export(moments=False, everywhere=True).weights
                total = sum(value.double().sum().item() for value in weights.values())
                entry[side] = {"losses": losses, "weights": total, "names": sorted(weights)}
            found[f"stage{stage}-accumulation{accumulation}-{bits}"] = entry
    return found


def memory(folder: Path, world: World, steps: int) -> dict[str, Any]:
    """Resident megabytes in the course of training with both engines."""
    teacher, engine = sharded("ViT-bigG", folder, world, 8), student(world, 2, 1)
    process, seen = psutil.Process(), []
    for number in range(steps):
        step(engine, teacher, world, number)
        seen.append(process.memory_info().rss / 1e6)
    return {"megabytes": seen, "resident": teacher.resident_bytes}


def errors(folder: Path, world: World) -> dict[str, Any]:
    """What each rank hears of files that do not fit or break, and whether a load afterwards is right."""
    found: dict[str, Any] = {}

    def attempt(label: str, make: Callable[[], object]) -> None:
        try:
            make()
        except (ValueError, OSError) as error:
            found[label] = [type(error).__name__, str(error)]

    attempt("bad", lambda: ShardedTeacher.load(describe("EVA02-E", str(folder / "bad.safetensors")), world, config=config()))
    original, count = SafetensorsFiles.read, 0

    def breaking(self: SafetensorsFiles, name: str) -> Tensor:
        nonlocal count
        count += 1
        if count == 20:
            raise OSError(5, "Input/output error", "weights")
        return original(self, name)

    SafetensorsFiles.read = breaking  # type: ignore[method-assign]
    attempt("breaking", lambda: sharded("EVA02-E", folder, world, 8))
    SafetensorsFiles.read = original  # type: ignore[method-assign]
    found["afterwards"] = compare(replicated("EVA02-E", folder, world, 8), sharded("EVA02-E", folder, world, 8), world)
    return found


def slowly(folder: Path, world: World) -> dict[str, Any]:
    """Loads so slowly that it can be killed in the middle."""
    original, count = SafetensorsFiles.read, 0

    def slow(self: SafetensorsFiles, name: str) -> Tensor:
        nonlocal count
        count += 1
        if count == 10:
            (folder / "in_the_middle").touch()
            time.sleep(60)
        return original(self, name)

    SafetensorsFiles.read = slow  # type: ignore[method-assign]
    streaming.BATCH_BYTES = 10_000
    sharded("EVA02-E", folder, world, 8)
    return {}


TASKS: dict[str, Callable[[Path, World], dict[str, Any]]] = {
    "teachers": teachers,
    "migrations": migrations,
    "students": students,
    "errors": errors,
    "slowly": slowly,
    "memory50": lambda folder, world: memory(folder, world, 50),
    "memory200": lambda folder, world: memory(folder, world, 200),
}


def main() -> None:
    world, folder = launch.start(), Path(sys.argv[2])
    for task in sys.argv[1].split(","):
        found = TASKS[task](folder, world)
        (folder / f"{task}-{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    launch.stop()


if __name__ == "__main__":
    main()
