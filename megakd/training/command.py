"""From a command line to a finished run: flags, launcher, the teacher's recipe where it has to come first, exit codes.

The flags are few and a test holds them: what is learned belongs to the recipe, how it runs to the DeepSpeed JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

from megakd.recipe import load as recipes
from megakd.recipe import texts
from megakd.recipe.credentials import redact
from megakd.runtime import environment, failures, launch, peers
from megakd.runtime.console import quiet_libraries
from megakd.runtime.exits import EXIT_INTERRUPTED, EXIT_LOST_PEER, EXIT_NOT_FINITE, EXIT_USER_ERROR, LossNotFinite
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopRequest
from megakd.runtime.starting import without_garbage_collection

DEFAULT_RECIPE = "smoke"


def parser() -> argparse.ArgumentParser:
    """The training program's flags."""
    flags = argparse.ArgumentParser(
        prog="megakd/train.py", description="Distil a CLIP-style teacher into a student, or train one without a teacher."
    )
    flags.add_argument(
        "--recipe", help=f"name of a shipped recipe ({', '.join(recipes.shipped())}) or a .toml file; default: {DEFAULT_RECIPE}"
    )
    flags.add_argument(
        "--ds_config", metavar="JSON", help="DeepSpeed configuration; default: ZeRO-1 in bf16 on a GPU, fp32 without ZeRO on a CPU"
    )
    flags.add_argument("--out", type=Path, metavar="FOLDER", help="run folder; default: runs/NAME with the recipe's name")
    flags.add_argument(
        "--resume", default="auto", help="auto (the newest valid checkpoint in the run folder, the default), none, or a checkpoint's folder"
    )
    flags.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override one setting of the recipe, e.g. optim.lr=3e-4",
    )
    flags.add_argument("--dry_run", action="store_true", help="check everything, show what would run, and exit")
    flags.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; ranks are read from the environment")
    return flags


def run_command(arguments: list[str]) -> int:
    """Run the command and return its exit code: 0, 2 for a mistake of the user's, 85 after a signal, 86 for a loss that is not finite.

    For programs that call it as well, submitit's task for one: it raises no SystemExit, and the caller's signal handlers are back when it
    returns. A hung run does not return: the process ends with 87.
    """
    try:
        flags = parser().parse_args(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    quiet_libraries()
    for argument in arguments:
        if found := texts.UNPRINTABLE.search(argument):
            _complain(None, f"error: the argument {texts.shown(argument)} holds {found[0]!r}, which no setting or path of megakd's may")
            return EXIT_USER_ERROR
    with contextlib.ExitStack() as until_stopped:  # signals count as noted until the process group is left
        return _guarded(flags, until_stopped)


def _guarded(flags: argparse.Namespace, until_stopped: contextlib.ExitStack) -> int:
    world = None
    try:
        world = launch.start()
        return _run(flags, world, until_stopped)
    except KeyboardInterrupt:
        text = "interrupted; what was trained since the last checkpoint is lost, the same command goes on from that checkpoint"
        return _end(world, text, EXIT_INTERRUPTED)
    except LossNotFinite as error:
        text = f"{error}\nThe last checkpoint is from before that. Lower optim.lr or look at the data, then start again."
        return _end(world, text, EXIT_NOT_FINITE)
    except Exception as error:
        # Of a lost connection, what the other rank said is the cause.
        lost = failures.is_lost_peer(error)
        if other := launch.heard(5.0 if lost else 0.0) if not failures.is_ours(error) else None:
            return _end(world, peers.of_another(other), other.code)
        explained = failures.explain(error)
        if explained is not None:
            return _end(world, f"error: {explained}", EXIT_LOST_PEER if lost else EXIT_USER_ERROR)
        launch.tell(
            f"error: {type(error).__name__}: {redact(str(error))}\n(a fault of the program, not of the settings; see its log)",
            1,
        )
        raise
    finally:
        launch.stop()


def _end(world: World | None, text: str, code: int) -> int:
    """Say why the run ends, on the main rank at once and on every other one later, and let none of them wait for this one."""
    text = redact(text)
    launch.tell(text, code)
    if world is not None and not world.is_main:
        launch.stop()  # before the wait in `_complain`: the others' collectives with this rank fail now
    _complain(world, text)
    return code


def _run(flags: argparse.Namespace, world: World, until_stopped: contextlib.ExitStack) -> int:
    name = flags.recipe or DEFAULT_RECIPE
    recipe, origin = recipes.load(name, flags.overrides)
    if flags.recipe is None and world.is_main:
        print(f"no --recipe given: running the shipped recipe '{name}' ({origin})", flush=True)
    with without_garbage_collection():
        # Heavy imports come after the recipe was read, so that a typo is answered at once.
        from megakd.training import prepare

        out = flags.out or Path("runs") / recipe.name
        request = prepare.RunRequest(recipe, origin, flags.ds_config, out, _resume(flags.resume, out))
        before = prepare.prerequisites(request)
        plan = prepare.prepare(request, world, prepare.to_come(request))
        if flags.dry_run:
            from megakd.training import dry_run

            text = dry_run.show(plan, world)
            if world.is_main:
                print(
                    redact(text)
                    + "".join(f"\nwould run first: {first.recipe_name} into {first.out}" for first in before)
                    + "\ndry run: all of this is sound"
                )
            return 0
        from megakd.training import run  # a dry run has no use for the fit loop

    stop = until_stopped.enter_context(StopRequest())
    for first in before:
        if world.is_main:
            print(f"not there yet: {first.out}; running {first.recipe_name} first", flush=True)
        code = run.Run(prepare.prepare(first, world), world, stop).execute()
        if code:
            return code
    if before:
        plan = prepare.prepare(request, world)
    return run.Run(plan, world, stop).execute()


def _resume(requested: str, out: Path) -> str:
    """`--resume` of this start: as asked for, until this job has left a checkpoint of its own; requeued, it goes on from the newest.

    Its own are those past the one that was asked for: its first start has set aside what was newer.
    """
    from megakd.runtime import checkpoint, run_folder

    try:
        earlier = json.loads((out / run_folder.RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or damaged, which is said where the run is prepared
        return requested
    starts = (earlier.get("jobs") or []) if isinstance(earlier, dict) else []
    past = "" if requested in ("auto", "none") else Path(requested).name
    saved = any(found.name > past for found in checkpoint.available(out))
    return "auto" if saved and environment.has_come_back(os.environ, starts) else requested


def _complain(world: World | None, text: str) -> None:
    """On the main rank at once; on the others later, when the launcher has ended them in case it was everyone's error."""
    if world is not None and not world.is_main:
        time.sleep(3)
        text = f"[rank {world.rank}] {text}"
    with contextlib.suppress(OSError):  # the log lies on the full disk too: the exit code is left to say it
        print(text, file=sys.stderr, flush=True)
