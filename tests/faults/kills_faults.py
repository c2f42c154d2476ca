"""Kills and full disks at any file operation of a training or of `megakd embed`: the same command goes on, to the same bits.

The program runs in a process that dies by SIGKILL at its n-th operation in the run folder, or finds no room from there on, up to three
times one after the other. Then it runs undisturbed, and its curve, its weights and its results are those of a run that never was.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.campaign import Mutant, SilentFault
from megakd.data.shapes import write_world
from megakd.runtime import checkpoint
from support import PROGRAMS
from support.processes import python
from support.runs import RECIPE, TEACHER, curve, settings

NAME, COUNT, FEW, LIMIT = "kills", 160, 4, 180
TRAIN = ("optim.steps=6", "checkpoint.every=2", "checkpoint.keep=2", "evaluation.every=3", "evaluation.batch=64")


class Programs:
    """Starts trainings and embeddings, each in a fresh process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        world = write_world(folder / "world", train=96, test=20, shard_size=48, zeroshot_per_class=1).out
        self.recipe = folder / "tiny.toml"
        self.recipe.write_text(RECIPE.format(world=world))
        self.sets = (*TRAIN, f"evaluation.retrieval={{ test = '{world}/test/*.tar' }}")
        self._server = python(PROGRAMS / "killable.py", stdin=subprocess.PIPE, stderr=None)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def run(self, what: str, out: Path, at: int | None, *, full: bool = False) -> tuple[int, int, str]:
        """Exit code (minus the signal of a kill), operations in the folder, and what was said."""
        log = out.with_suffix(".log")
        log.unlink(missing_ok=True)
        arguments = ["--recipe", str(self.recipe), "--out", str(out), *settings(*self.sets)]
        if what == "embed":
            arguments = [str(self.recipe), str(out), *TEACHER]
        asked = {"what": what, "arguments": arguments, "watched": str(out), "at": at, "full": full, "out": str(log)}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer["status"], answer["operations"], log.read_text(errors="replace")

    def end(self) -> None:
        self._server.kill()
        self._server.communicate()


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    programs = Programs(folder)
    try:
        undisturbed = {}
        for what in ("train", "embed"):
            code, operations, said = programs.run(what, folder / f"undisturbed_{what}", None)
            assert code == 0, said
            undisturbed[what] = (folder / f"undisturbed_{what}", operations)
        for number in range(count):
            what = "embed" if number % 8 == 3 else "train"
            whole, operations = undisturbed[what]
            fates = [(draw.randint(1, operations), draw.random() < 0.3) for _ in range(draw.choice((1, 1, 2, 3)))]
            named = ", ".join(f"{'disk full' if full else 'killed'} at operation {at} of {operations}" for at, full in fates)

            def attempt(what: str = what, whole: Path = whole, fates: list[tuple[int, bool]] = fates, number: int = number) -> str:
                return _attempt(programs, what, whole, folder / f"mutant_{number}", fates)

            yield Mutant(f"{what}: {named}", attempt)
    finally:
        programs.end()


def _attempt(programs: Programs, what: str, whole: Path, out: Path, fates: list[tuple[int, bool]]) -> str:
    for at, full in fates:
        code, _, said = programs.run(what, out, at, full=full)
        if code not in ((0, 2) if full else (0, -9)):
            raise RuntimeError(f"exit code {code}: {said[-3000:]}")
        if full and code == 2 and ("Traceback" in said or "No space left" not in said):
            raise RuntimeError(f"not one message: {said[-3000:]}")
    code, _, said = programs.run(what, out, None)
    if code != 0:
        raise RuntimeError(f"the same command does not go on, exit code {code}: {said[-3000:]}")
    if what == "train":
        if curve(out) != curve(whole):
            raise SilentFault(f"another curve: {curve(out)} in place of {curve(whole)}")
        if [path.name for path in checkpoint.available(out)] != [path.name for path in checkpoint.available(whole)]:
            raise SilentFault(f"checkpoints {checkpoint.available(out)}")
        compared = [path.relative_to(whole) for path in (*checkpoint.available(whole)[-1].iterdir(), *(whole / "model").rglob("*"))]
        mine, theirs = (json.loads((run / "evaluation.json").read_text()) for run in (out, whole))
        if any(mine[key] != theirs[key] for key in theirs if key != "images_per_second"):
            raise SilentFault(f"other scores: {mine}")
    else:
        compared = [path.relative_to(whole) for path in (whole / "manifest.json", *(whole / "parts").iterdir())]
    for path in compared:
        if (whole / path).is_file() and (out / path).read_bytes() != (whole / path).read_bytes():
            raise SilentFault(f"{path} is not what the undisturbed run wrote")
    if left := [str(path.relative_to(out)) for path in out.rglob(".*")]:
        raise SilentFault(f"left behind: {left}")
    return "sound"
