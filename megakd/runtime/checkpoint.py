"""Checkpoints: one folder a step, complete or absent, readable without unpickling, independent of ZeRO stage and rank count.

    checkpoints/step_00000500/
        weights.safetensors     every trained parameter, fp32
        moments.safetensors     AdamW's moments, fp32
        state.json              step, updates, position in the data, generator seeds, sizes and SHA-256 of the two files

A checkpoint is written to a hidden folder beside it, synced to the disk and renamed: a crash at any moment leaves the previous ones
untouched. Random numbers need no stored state: every step seeds torch's generators from (seed, step, rank), see `trainer.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megakd.runtime.disk import sync
from megakd.runtime.engine import State
from megakd.runtime.signals import LossNotFinite

FORMAT = 1
WEIGHTS, MOMENTS, STATE = "weights.safetensors", "moments.safetensors", "state.json"
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
    """A checkpoint that cannot be written or read; the message says which one, why, and what to do."""


def folder_of(run: Path) -> Path:
    return run / "checkpoints"


def save(run: Path, progress: Progress, state: State, keep: int) -> Path:
    """Write one checkpoint atomically and remove all but the newest `keep`. Called by rank 0 alone.

    Raises CheckpointError when the disk is full or not writable, and LossNotFinite for a state that no run could go on from; the
    earlier checkpoints then stay as they were.
    """
    broken = [name for name, value in (*state.weights.items(), *state.moments.items()) if not bool(value.isfinite().all())]
    if broken:
        shown = ", ".join(broken[:3]) + f" and {len(broken) - 3} more" * (len(broken) > 3)
        raise LossNotFinite(f"step {progress.step}: not saved, because {shown} became NaN or infinite in the last update")
    folder = folder_of(run)
    target = folder / f"step_{progress.step:08d}"
    partial = folder / f".partial_{target.name}"
    try:
        _remove(partial)
        partial.mkdir(parents=True)
        save_file(state.weights, partial / WEIGHTS)
        save_file(state.moments, partial / MOMENTS)
        files = {name: {"bytes": (partial / name).stat().st_size, "sha256": _digest(partial / name)} for name in (WEIGHTS, MOMENTS)}
        content = {"format": FORMAT, **asdict(progress), "updates": state.updates, "files": files}
        (partial / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for name in (WEIGHTS, MOMENTS, STATE):
            sync(partial / name)
        _remove(target)
        partial.rename(target)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"could not save {target}: {error}; the earlier checkpoints in {folder} are untouched: "
            f"free some space and start the same command again"
        ) from error
    for old in available(run)[:-keep]:
        _remove(old)
    return target


def available(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, by name alone: `load` checks what is in them."""
    return sorted(folder_of(run).glob("step_????????"))


def latest_valid(run: Path, log: Log) -> Path | None:
    """The newest checkpoint whose files are complete and unchanged, or None. Damaged ones are passed over and said."""
    for candidate in reversed(available(run)):
        try:
            _verify(candidate)
        except CheckpointError as error:
            log(f"passing over a damaged checkpoint: {error}")
            continue
        return candidate
    return None


def load(path: Path) -> tuple[Progress, State]:
    """Read a checkpoint. Raises CheckpointError naming the file when it is missing, damaged or of another format."""
    content = _verify(path)
    return _progress(content), State(load_file(path / WEIGHTS), load_file(path / MOMENTS), content["updates"])


def load_weights(path: Path) -> tuple[Progress, dict[str, Tensor]]:
    """As `load`, without the optimizer's moments: for evaluation and export."""
    return _progress(_verify(path)), load_file(path / WEIGHTS)


def check_fits(path: Path, weights: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError with the names and shapes that differ when `weights` are of another architecture."""
    found = {name: tuple(value.shape) for name, value in weights.items()}
    problems = [
        f"{name}: {shape} here, {found.get(name, 'absent')} in the checkpoint"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]
    problems += [f"{name}: absent here, {shape} in the checkpoint" for name, shape in found.items() if name not in expected]
    if problems:
        shown = "\n  ".join(problems[:8] + [f"... and {len(problems) - 8} more"] * (len(problems) > 8))
        raise CheckpointError(
            f"checkpoint {path} is of another architecture:\n  {shown}\nresume with the recipe it was made with, or choose another --out"
        )


def _verify(path: Path) -> dict[str, Any]:
    if not (path / STATE).is_file():
        raise CheckpointError(f"{path}: no checkpoint there (it has no {STATE}); a run's checkpoints are in RUN/checkpoints/step_*")
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {content['format']}, this version reads format {FORMAT}")
        for name, facts in content["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != facts["bytes"] or _digest(file) != facts["sha256"]:
                raise CheckpointError(f"{path}: {name} is missing or was changed after it was written; resume from another checkpoint")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {STATE} cannot be read ({error}); resume from another checkpoint") from error
    return content  # type: ignore[no-any-return]


def _progress(content: dict[str, Any]) -> Progress:
    return Progress(step=content["step"], position=content["position"], seed=content["seed"], data=content["data"])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(folder: Path) -> None:
    """Remove a folder so that a crash halfway never leaves it under its valid name."""
    if folder.exists():
        doomed = folder.with_name(f".removed_{folder.name.lstrip('.')}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)
