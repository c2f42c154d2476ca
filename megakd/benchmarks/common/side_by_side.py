"""What the benchmarks of training steps share: this program's run, its timed steps, and how long they are waited for."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.benchmarks.common.children import Child, running
from megakd.benchmarks.common.logs import Step
from megakd.runtime import launch

WARM_UP = 2  # the first steps fill the allocators and the loaders' queues
# Programs are stopped long before: none ends its epoch, drains its loader or writes a checkpoint inside the timed steps.
UNREACHED = 100_000
START_SECONDS, PAIR_SECONDS = 600, 4  # limits of a start, and of the embedding or the step of one pair on a busy core


@dataclass(frozen=True)
class Timed:
    """What one side did in one round. processor_seconds: of a timed step, over the program and its workers."""

    steps: list[Step]
    processor_seconds: float

    @property
    def rates(self) -> list[float]:
        """Images/s of each step."""
        return [step.images_per_second for step in self.steps]


def recipe(name: str, pattern: str, student: dict[str, Any], teacher: dict[str, Any], batch: int, workers: int) -> dict[str, Any]:
    """Contrastive and similarity loss, as a run.json holds a recipe. Its augmentation is open_clip's default."""
    return {
        "name": name,
        "data": {"train": pattern, "workers": workers},
        "views": {"crop_scale": [0.9, 1.0], "flip": 0.0},
        "student": student,
        "teacher": teacher,
        "objectives": {"contrastive": 1.0, "similarity": 1.0},
        "optim": {"steps": UNREACHED, "batch": batch, "lr": 1e-4, "warmup": 1000},
        "evaluation": {"batch": batch},
        "checkpoint": {"every": UNREACHED},
        "log": {"every": 1},
    }


def write_recipe(content: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"recipe": content}), encoding="utf-8")
    return path


def embed(content: dict[str, Any], store: Path, folder: Path, samples: int, threads: int) -> None:
    """The teacher's embeddings of all shards of this recipe into `store`, by `megakd embed`."""
    print(f"embedding {samples} pairs once", flush=True)
    teacher = {key: value for key, value in content["teacher"].items() if key != "store"}
    path = write_recipe({**content, "teacher": teacher}, folder / "embed.json")
    command = [sys.executable, "-P", "-m", "megakd.cli", "embed", "--recipe", str(path), "--views", "1", "--out", str(store)]
    with running(command, folder, "embed", threads) as child:
        child.wait_for(lambda: True if ": complete, " in child.text() else None, START_SECONDS + samples * PAIR_SECONDS)


@contextmanager
def training(
    content: dict[str, Any], folder: Path, threads: int, *, ranks: int = 1, config: dict[str, Any] | None = None
) -> Iterator[Child]:
    """megakd/train.py on this recipe into FOLDER/run, in float32 without ZeRO on a GPU as well; killed at the end of the block.

    config: the DeepSpeed JSON. Several ranks share this machine's cores, in one process group, which `running` ends as a whole.
    """
    recipe_file, json_file = write_recipe(content, folder / "recipe.json"), folder / "ds_config.json"
    json_file.write_text(json.dumps(config or {}), encoding="utf-8")
    program = Path(__file__).parents[2] / "train.py"
    command = [sys.executable, str(program), "--recipe", str(recipe_file), "--ds_config", str(json_file), "--out", str(folder / "run")]
    with running(command if ranks == 1 else _each_rank(command, ranks), folder, folder.name, threads) as child:
        yield child


def _each_rank(command: list[str], ranks: int) -> list[str]:
    """A shell that starts all ranks. torchrun would give each a session of its own, whose processor time `Child` would not count."""
    meeting = f"WORLD_SIZE={ranks} LOCAL_WORLD_SIZE={ranks} MASTER_ADDR=127.0.0.1 MASTER_PORT={launch.free_port()}"
    started = (f'RANK={rank} LOCAL_RANK={rank} {meeting} {shlex.join(command)} & ids="$ids $!";' for rank in range(ranks))
    return ["sh", "-c", " ".join([*started, "for id in $ids; do wait $id || exit $?; done"])]


def timed(child: Child, steps: Callable[[], list[Step]], count: int, batch: int, warm_up: int = WARM_UP) -> Timed:
    """The `count` steps after the warm-up. A look every .2 s is exact enough for the processor time of steps that take seconds."""
    needed = warm_up + count
    limit = START_SECONDS + needed * PAIR_SECONDS * max(batch, 32)

    def at_least(number: int) -> tuple[list[Step], float] | None:
        done = steps()
        return (done, child.processor_seconds()) if len(done) >= number else None

    before, start = child.wait_for(lambda: at_least(warm_up), limit)
    after, end = child.wait_for(lambda: at_least(max(needed, len(before) + 1)), limit)
    return Timed(after[warm_up:needed], (end - start) / (len(after) - len(before)))
