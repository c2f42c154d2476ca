"""Entry point for every launcher: `deepspeed megakd/train.py`, `torchrun`, `srun python`, or a plain `python`.

Nothing imports this file. It takes its own folder, where a launcher starts, off sys.path before any other import: a module in
megakd/ would otherwise hide a library's of the same name.
"""

import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from megakd.runtime.preemption import ignore_from_here, note_early  # noqa: E402
from megakd.runtime.starting import without_garbage_collection  # noqa: E402

note_early()  # before the imports below, which take ten seconds

with without_garbage_collection():
    from megakd.training.command import run_command


def main() -> int:
    code = run_command(sys.argv[1:])
    ignore_from_here()
    return code


if __name__ == "__main__":
    sys.exit(main())
