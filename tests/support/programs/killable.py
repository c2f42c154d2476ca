"""Programs that die, or meet a full disk, at a chosen file operation in a folder. A process that has imported everything forks them.

Reads a line of JSON for each: {"what": "train" or "embed", "arguments": [...], "watched": FOLDER, "at": N or null, "full": bool,
"out": FILE} and answers with {"status": exit code, or minus the signal, "operations": how many there were}.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Fate:
    """An audit hook: counts what changes files in a folder, and at the chosen operation ends the process, or the room on the disk."""

    def __init__(self, watched: str, at: int | None, full: bool) -> None:
        self._watched, self._at, self._full, self.operations = watched, at, full, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not (flags & WRITING if mode is None else set(str(mode)) & set("wax+")):
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            path = arguments[0]
        else:
            return
        if isinstance(path, int) or not os.fsdecode(path).startswith(self._watched):
            return
        self.operations += 1
        if self._at is None or self.operations < self._at:
            return
        if not self._full:
            os.kill(os.getpid(), signal.SIGKILL)
        if event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))


def _run(what: str, arguments: list[str]) -> int:
    if what == "train":
        from megakd.training.command import run_command

        return run_command(arguments)
    from megakd.recipe import load as recipes
    from megakd.runtime import failures, launch
    from megakd.teachers.embed import EmbedJob, EmbedRequest

    recipe, out, *overrides = arguments
    world = launch.start()
    try:
        EmbedJob(recipes.load(recipe, overrides)[0], EmbedRequest(Path(out), 2), world, part=16).embed()
    except Exception as error:  # as the verb explains it
        explained = failures.explain(error)
        if explained is None:
            raise
        print(f"error: {explained}", file=sys.stderr)
        return 2
    finally:
        launch.stop()
    return 0


def _child(asked: dict[str, Any], answer: int) -> None:
    handle = os.open(asked["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    fate = Fate(asked["watched"], asked["at"], asked["full"])
    sys.addaudithook(fate)
    code = 1
    try:
        code = _run(asked["what"], asked["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(answer, str(fate.operations).encode())
        os._exit(code)


def main() -> None:
    import megakd.teachers.embed
    import megakd.training.dry_run
    import megakd.training.run  # noqa: F401 - what a run imports, before the first fork

    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _child(asked, writing)
        os.close(writing)
        told = os.read(reading, 64)
        _, status = os.waitpid(child, 0)
        os.close(reading)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "operations": int(told or 0)}), flush=True)


if __name__ == "__main__":
    main()
