"""What the families of settings share: a small world, and the training program tried in this process, by `--dry_run` and for real."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from faults.campaign import verdict_of_command
from megakd.data.shapes import write_world
from megakd.runtime import exits
from support.runs import RECIPE, train

# A run that is over in two steps, whatever the recipe says, and starts no thousand processes.
SHORT = ("optim.steps=2", "optim.warmup=0", "data.max_bad_fraction=1.0", "data.workers=0")


def recipe_in(folder: Path) -> Path:
    """The tiny recipe on a world of 64 pairs, both written below `folder`."""
    world = write_world(folder / "world", train=64, test=8, shard_size=32, zeroshot_per_class=1).out
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(world=world), encoding="utf-8")
    return path


def tried(recipe: Path | str, *arguments: str | Path, sets: tuple[str, ...] = (), out: Path) -> str:
    """The verdict on a command. What the dry run calls sound has to run as well, for two steps.

    A loss that is not finite is a documented end (86), not a fault of the settings' reading.
    """
    dry = train(recipe, *arguments, "--out", out, "--dry_run", sets=sets)
    verdict = verdict_of_command(dry.code, dry.err)
    if verdict == "refused":
        if "error: " not in dry.err:
            raise RuntimeError(f"no message of megakd's: {dry.err[-1500:]}")
        return verdict
    real = train(recipe, *arguments, "--out", out, sets=(*sets, *SHORT))
    with contextlib.suppress(OSError):
        shutil.rmtree(out)
    if real.code == exits.EXIT_NOT_FINITE:
        return "sound"
    if real.code:
        raise RuntimeError(f"the dry run called it sound, and the run ended with {real.code}: {real.err[-2000:]}")
    return "sound"
