"""Damaged run folders: the newest good checkpoint is gone on from, whatever the others hold, and what was lost is said."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from faults import damage
from faults.campaign import Mutant, SilentFault, mutants_of_copies
from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint, files, run_folder
from megakd.runtime.checkpoint import Progress
from megakd.runtime.engine import State
from megakd.runtime.run_folder import RunLog

NAME, COUNT, LIMIT = "checkpoints", 700, 20
STEPS, BATCH, SEED, DATA = (3, 6, 9), 16, 3, 12345
RECIPE = """
name = "damaged"
seed = 3
[data]
train = "/data/{0..3}.tar"
[student]
model = "ViT-B-32"
[objectives]
contrastive = 1.0
[optim]
steps = 12
batch = 16
lr = 1e-3
"""


@dataclass(frozen=True)
class Original:
    """A run folder stopped after step 9 of 12. formerly: its checkpoints are as versions wrote them that knew no checksum of state.json."""

    folder: Path
    formerly: bool
    recipe: Recipe


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    originals = [_original(folder / f"original_{number}", formerly=bool(number)) for number in range(2)]
    return mutants_of_copies(count, draw, folder, originals, _damaged, _attempt)


def _state(step: int) -> State:
    weights = {"clip.a": torch.full((7, 2), float(step)), "clip.b": torch.arange(3.0) + step}
    return State(weights, {f"{kind}/{name}": value + 1 for kind in ("exp_avg", "exp_avg_sq") for name, value in weights.items()}, step)


def _original(run: Path, *, formerly: bool) -> Original:
    run.mkdir()
    path = run / "recipe.toml"
    path.write_text(RECIPE)
    recipe = recipes.load(str(path))[0]
    RunLog(run, main=True).open(recipe, {"train_batch_size": BATCH}, 1)
    rows = [{"step": step, "loss": 1 / step, "losses": {"contrastive": 1 / step}} for step in range(1, 11)]
    rows.insert(6, {"step": 6, "event": "evaluation", "content": {"step": 6, "x": 0.5}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in STEPS:
        folder = checkpoint.save(run, Progress(step, BATCH * step, SEED, DATA), _state(step), 5)
        if formerly:
            content = json.loads((folder / "state.json").read_text()) | {"format": 1}
            del content["sha256"]
            (folder / "state.json").write_text(json.dumps(content))
    return Original(run, formerly, recipe)


def _damaged(run: Path, draw: random.Random) -> str:
    found = checkpoint.available(run)
    newest = draw.choice((found[-1], found[-1], found[1], found[0]))
    kind = draw.choice(
        ("state",) * 8 + ("weights",) * 4 + ("header",) * 3 + ("folders",) * 4 + ("metrics",) * 3 + ("run.json",) * 3 + ("forged",)
    )
    if kind == "state":
        way = damage.json_file if draw.random() < 0.8 else damage.bytes_of
        return f"{newest.name}, {way(newest / 'state.json', draw)}"
    file = newest / draw.choice(("weights.safetensors", "moments.safetensors"))
    if kind == "weights":
        return f"{newest.name}, {damage.bytes_of(file, draw)}"
    if kind == "header":
        return f"{newest.name}, {damage.header(file, draw)}"
    if kind == "forged":
        return f"{newest.name}, {damage.header(file, draw)}, with its checksum{_with_checksums(newest)}"
    if kind == "metrics":
        return damage.bytes_of(run / "metrics.jsonl", draw) if draw.random() < 0.5 else _lines(run / "metrics.jsonl", draw)
    if kind == "run.json":
        return damage.json_file(run / "run.json", draw) if draw.random() < 0.8 else damage.bytes_of(run / "run.json", draw)
    return _folders(run, newest, found, draw)


def _with_checksums(folder: Path) -> str:
    """state.json agrees with the damaged files: only what is in them tells."""
    with contextlib.suppress(ValueError):
        content = json.loads((folder / "state.json").read_text())
        for name in content["files"]:
            content["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": files.sha256(folder / name)}
        if content.pop("sha256", None):
            content["sha256"] = files.json_sha256(content)
        (folder / "state.json").write_text(json.dumps(content))
    return "s"


def _lines(path: Path, draw: random.Random) -> str:
    lines = path.read_text().splitlines()
    place = draw.randrange(len(lines))
    lines[place] = draw.choice(("garbage", "[]", "{}", '{"step": "3"}', "null", "[" * 50_000, lines[place][:20], "\x00" * 30, "NaN"))
    path.write_text("\n".join(lines) + "\n")
    return f"metrics.jsonl: line {place} becomes {lines[place][:20]!r}"


def _folders(run: Path, chosen: Path, found: list[Path], draw: random.Random) -> str:
    moved = ("renamed", "exchanged", "partial", "removed", "copied", "link")
    kind = draw.choice((*moved, "missing file", "missing", "empty", "file", "foreign", "no run.json"))
    if kind == "missing file":
        (chosen / draw.choice(("state.json", "weights.safetensors", "moments.safetensors"))).unlink()
    elif kind in ("missing", "empty", "file"):
        shutil.rmtree(chosen)
        if kind == "empty":
            chosen.mkdir()
        elif kind == "file":
            chosen.write_text("a file")
    elif kind == "renamed":
        chosen.rename(chosen.with_name(draw.choice(("step_00000012", "step_00000019", "step_0000000a", "step_9"))))
    elif kind == "exchanged":
        aside = chosen.with_name("aside")
        other = found[0] if chosen != found[0] else found[1]
        chosen.rename(aside)
        other.rename(chosen)
        aside.rename(other)
    elif kind in ("partial", "removed"):
        shutil.copytree(chosen, chosen.with_name(f".{kind}_step_00000012" if draw.random() < 0.5 else f".step_00000012.{kind}"))
    elif kind == "foreign":
        (chosen / "notes.txt").write_text("a user's")
    elif kind == "link":
        chosen.rename(run / "moved")
        chosen.symlink_to(run / "moved")
    elif kind == "copied":
        shutil.copytree(chosen, chosen.with_name("step_00000011"))
    else:
        (run / "run.json").unlink()
    return f"{kind}: {chosen.name}"


def _attempt(original: Original, run: Path) -> str:
    """As a run starts: is it this recipe's, which checkpoint, which rows."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        log = RunLog(run, main=True)
        files.clear(run, checkpoint.folder_of(run))
        run_folder.check_resume(run, "auto", original.recipe)
        changes = run_folder.changes(run, original.recipe)
        path = checkpoint.latest_valid(run, log.say)
        if path is None:
            raise SilentFault("no checkpoint was found at all")
        progress, state = checkpoint.load(path)
        if (progress.seed, progress.data) != (SEED, DATA) or progress.position != BATCH * progress.step:
            return "refused"  # as the job does, which knows these: see the tests of training/test_resume.py
        before = _rows(original.folder, progress.step)
        log.keep_until(progress.step)
        log.open(original.recipe, {}, 1)
    said = out.getvalue()
    truth = _state(progress.step)
    if progress.step not in STEPS or state.updates != progress.step or not _same(state, truth):
        raise SilentFault(f"{path.name}: step {progress.step} holds something else")
    after = _rows(run, progress.step)
    if after != before and "damaged lines were dropped" not in said and not _cut(run, original, progress.step):
        raise SilentFault(f"{len(before)} rows before, {len(after)} after, and not a word")
    whole = progress.step == max(STEPS)
    if not whole and not said and _named(run):
        raise SilentFault(f"step {progress.step} was taken without a word about what is newer")
    recipes.load(str(run / "run.json"))
    return ("sound" if not said and not changes else "told") if whole else "older"


def _named(run: Path) -> bool:
    """Whether a checkpoint is there, under the newest one's name."""
    return (checkpoint.folder_of(run) / f"step_{max(STEPS):08d}").exists()


def _rows(run: Path, step: int) -> list[object]:
    return [row for row in run_folder.read_metrics(run) if row["step"] <= step]


def _cut(run: Path, original: Original, step: int) -> bool:
    """Whether the file ends earlier than it did, as after a crash, or a row has another value: nothing in a row tells."""
    return len(_rows(run, step)) <= len(_rows(original.folder, step))


def _same(found: State, truth: State) -> bool:
    pairs = [(found.weights, truth.weights), (found.moments, truth.moments)]
    return all(mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine) for mine, theirs in pairs)
