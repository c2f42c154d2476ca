"""Checkpoints: one folder a step, complete or absent, readable without unpickling, independent of ZeRO stage and rank count.

    checkpoints/step_00000500/
        weights.safetensors     every trained parameter, fp32, and those that student.freeze holds
        moments.safetensors     AdamW's moments, fp32
        averages.safetensors    averages of the weights that move and of buffers, fp32; only with optim.ema
        objectives.safetensors  what losses keep from step to step; only where one does
        state.json              step, updates, position in the data, generator seeds, sizes and SHA-256 of these files and of itself

A checkpoint is written to a hidden folder beside it, synced to the disk and renamed: a crash at any moment leaves the previous ones
untouched. Random numbers need no stored state: every step seeds torch's generators from (seed, step, rank), see `training/trainer.py`.
All is checked when it is read; of format 1, which had no checksum of `state.json`, the numbers are compared with each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megakd.runtime import files
from megakd.runtime.engine import MOMENTS as KINDS
from megakd.runtime.engine import State
from megakd.runtime.exits import LossNotFinite

FORMAT = 2
WEIGHTS, MOMENTS, STATE = "weights.safetensors", "moments.safetensors", "state.json"
OBJECTIVES, AVERAGES = "objectives.safetensors", "averages.safetensors"  # where there are some
_LARGEST_STATE = 1 << 20  # bytes; ours has under a thousand
_NAME = re.compile(r"step_(\d{8,})")
Log = Callable[[str], None]


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, pairs consumed (the position in the data), the seed its generators derive from, and which data.

    data: `ShardSet.signature`, without which a position means nothing.
    """

    step: int
    position: int
    seed: int
    data: int


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read: which one, why, and what to do."""


def folder_of(run: Path) -> Path:
    return run / "checkpoints"


def save(run: Path, progress: Progress, state: State, keep: int) -> Path:
    """Write one checkpoint atomically and remove all but the newest `keep`. For rank 0.

    Raises CheckpointError when the disk is full or not writable, and LossNotFinite for a state with NaN or infinity; the earlier
    checkpoints then stay as they were.
    """
    some = {name: content for name, content in ((OBJECTIVES, state.objectives), (AVERAGES, state.averages)) if content}
    tensors = {WEIGHTS: state.weights, MOMENTS: state.moments} | some
    broken = [name for content in tensors.values() for name, value in content.items() if not bool(value.isfinite().all())]
    if broken:
        shown = ", ".join(broken[:3]) + f" and {len(broken) - 3} more" * (len(broken) > 3)
        raise LossNotFinite(f"step {progress.step}: not saved, because {shown} became NaN or infinite in the last update")
    folder = folder_of(run)
    target = folder / f"step_{progress.step:08d}"
    try:
        files.clear(folder)  # a run has one writer
        with files.atomic_folder(target) as partial:
            for file, named_tensors in tensors.items():
                save_file(named_tensors, partial / file)
            content = {"format": FORMAT, **asdict(progress), "updates": state.updates}
            content["files"] = {
                name: {"bytes": (partial / name).stat().st_size, "sha256": files.sha256(partial / name)} for name in tensors
            }
            text = json.dumps({**content, "sha256": files.json_sha256(content)}, indent=1)
            (partial / STATE).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not save {target}: {error}; the earlier checkpoints in {folder} are untouched: "
            f"free some space and start the same command again"
        ) from error
    prune(run, keep)
    return target


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep`: after each save, and at a start, as a kill may have come between."""
    for old in available(run)[:-keep]:
        files.remove(old)


def available(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, by name; `load` checks their content."""
    return sorted(path for path in folder_of(run).glob("step_*") if _NAME.fullmatch(path.name))


def latest_valid(run: Path, log: Log) -> Path | None:
    """The newest checkpoint that `load` reads, or None. Damaged ones are logged."""
    for candidate in reversed(available(run)):
        try:
            load(candidate)
        except CheckpointError as error:
            log(f"passing over a damaged checkpoint: {error}")
            continue
        return candidate
    return None


def load(path: Path) -> tuple[Progress, State]:
    """Read a checkpoint. Raises CheckpointError naming the file when it is missing, damaged, or of another format."""
    progress, content = _verified(path)
    weights, moments = _tensors(path / WEIGHTS), _tensors(path / MOMENTS)
    trained = {name.partition("/")[2] for name in moments}
    for name, value in moments.items():
        kind, _, parameter = name.partition("/")
        of = weights.get(parameter)
        if kind not in KINDS or of is None or value.shape != of.shape or {value.dtype, of.dtype} != {torch.float32}:
            raise CheckpointError(f"{path / MOMENTS}: {name} is no moment, in float32, of a tensor in {WEIGHTS}; {_ELSEWHERE}")
    if len(moments) != len(KINDS) * len(trained) or any(bool((moments[f"exp_avg_sq/{name}"] < 0).any()) for name in trained):
        raise CheckpointError(f"{path / MOMENTS}: moments are missing, or squares are negative; {_ELSEWHERE}")
    objectives = _tensors(path / OBJECTIVES) if OBJECTIVES in content["files"] else {}
    averages = _tensors(path / AVERAGES) if AVERAGES in content["files"] else {}
    unlike = [name for name, value in averages.items() if name not in weights or value.shape != weights[name].shape]
    if unlike or (averages and not trained <= averages.keys()):
        raise CheckpointError(f"{path / AVERAGES}: not the averages of what moves in {WEIGHTS}; {_ELSEWHERE}")
    return progress, State(weights, moments, content["updates"], objectives, averages)


def load_weights(path: Path, *, averaged: bool = False) -> tuple[Progress, dict[str, Tensor]]:
    """As `load`, without the optimizer's moments: for evaluation and export. averaged: `State.averaged`."""
    progress, content = _verified(path)
    weights = _tensors(path / WEIGHTS)
    if averaged and AVERAGES not in content["files"]:
        raise CheckpointError(f"{path}: holds no averages of the weights, as its run had no optim.ema; take its current weights")
    return progress, weights | (_tensors(path / AVERAGES) if averaged else {})


def check_fits(path: Path, weights: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError with the names and shapes that differ when `weights` are of another architecture."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    problems = [
        f"{name}: {shape} here, {shapes.get(name, 'absent')} in the checkpoint"
        for name, shape in expected.items()
        if shapes.get(name) != shape
    ]
    problems += [f"{name}: absent here, {shape} in the checkpoint" for name, shape in shapes.items() if name not in expected]
    if problems:
        shown = "\n  ".join(problems[:8] + [f"... and {len(problems) - 8} more"] * (len(problems) > 8))
        raise CheckpointError(
            f"checkpoint {path} is of another architecture:\n  {shown}\nresume with the recipe it was made with, or choose another --out"
        )


_ELSEWHERE = "resume from another checkpoint"


def _verified(path: Path) -> tuple[Progress, dict[str, Any]]:
    """What `state.json` says, after it and the files that it lists were checked."""
    if not (path / STATE).is_file():
        raise CheckpointError(f"{path}: no checkpoint there (it has no {STATE}); a run's checkpoints are in RUN/checkpoints/step_*")
    try:
        content = _state(path)
        for name, facts in content["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != facts["bytes"] or files.sha256(file) != facts["sha256"]:
                raise CheckpointError(f"{path}: {name} is missing or was changed after it was written; {_ELSEWHERE}")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_ELSEWHERE}") from error
    return Progress(content["step"], content["position"], content["seed"], content["data"]), content


def _state(path: Path) -> dict[str, Any]:
    file = path / STATE
    try:
        if file.stat().st_size > _LARGEST_STATE:
            raise ValueError(f"{file.stat().st_size} bytes, a checkpoint's has under a thousand")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {STATE} cannot be read ({error}); {_ELSEWHERE}") from error
    if not isinstance(content, dict) or type(version := content.get("format")) is not int:
        raise CheckpointError(f"{path}: {STATE} says no format, as a checkpoint's does; {_ELSEWHERE}")
    if version not in (1, FORMAT):
        raise CheckpointError(f"{path}: format {version}, this version reads format {FORMAT}")
    checksum = content.pop("sha256", None)
    if (checksum is not None or version == FORMAT) and checksum != files.json_sha256(content):
        raise CheckpointError(f"{path}: {STATE} was changed after it was written; {_ELSEWHERE}")
    if problem := _contradiction(path.name, content):
        raise CheckpointError(f"{path}: {STATE} cannot be true: {problem}; {_ELSEWHERE}")
    return content


def _contradiction(folder: str, content: dict[str, Any]) -> str | None:
    """What of the numbers cannot be true; of format 1 nothing else tells that they were changed."""
    for key in ("step", "position", "seed", "data", "updates"):
        if type(content.get(key)) is not int or content[key] < 0:
            return f"{key} = {content.get(key)!r} is no count"
    if (named := _NAME.fullmatch(folder)) and int(named[1]) != content["step"]:
        return f"step = {content['step']} in the folder {folder}"
    if content["format"] == 1 and content["updates"] != content["step"]:
        return f"updates = {content['updates']} after step {content['step']}"
    if content["format"] == 1 and content["step"] and content["position"] % content["step"]:
        return f"position = {content['position']} after {content['step']} steps of equal size"
    entries = content.get("files")
    if not isinstance(entries, dict) or set(entries) - {OBJECTIVES, AVERAGES} != {WEIGHTS, MOMENTS}:
        return f"files are not {WEIGHTS} and {MOMENTS}"
    if any(not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys() for facts in entries.values()):
        return "files have no size or checksum"
    return None


def _tensors(file: Path) -> dict[str, Tensor]:
    """A file's tensors, all finite."""
    try:
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); {_ELSEWHERE}") from error
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{file}: {name} holds NaN or infinity; {_ELSEWHERE}")
    return tensors
