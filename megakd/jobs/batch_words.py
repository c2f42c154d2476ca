"""Words that `megakd submit` writes into a batch file: each stays one word, and none becomes a command.

A line break would end the comment that #SBATCH is. sbatch parses its lines neither as the shell nor as Python, so quotes are refused as
well, and in the names of logs it replaces %j and the like.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# Line breaks of all kinds, other control characters, and bytes that are no UTF-8.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
CONTROL_OF_LINES = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
NAMES = re.compile(r"[A-Za-z0-9_.,:+@/-]+")
FORMS = {
    "partition": (NAMES, "names with commas"),
    "account": (NAMES, "a name"),
    "qos": (NAMES, "a name"),
    "constraint": (re.compile(r"[A-Za-z0-9_.,:+@/&|()*\[\]=-]+"), "features with &, | and ,"),
    "mem": (re.compile(r"\d+(\.\d+)?[KMGTkmgt]?[Bb]?"), "a number with K, M, G or T, e.g. 480G"),
}
WORDS = ("time", "container_image", "container_mounts", "python")


def check(wanted: Any, top: Path | None, here: Path) -> None:
    """Raise ValueError naming the option, its value and what it may hold.

    wanted: the options as attributes. top: the job's folder, to which SLURM writes logs, None without SLURM. here: the current folder,
    which containers mount.
    """
    for option, (form, what) in FORMS.items():
        value = getattr(wanted, option)
        if value is not None and not form.fullmatch(value):
            raise ValueError(f"--{option} {value!r}: write {what}")
    for option in WORDS:
        value = getattr(wanted, option)
        if value is not None and (CONTROL.search(value) or not value.strip()):
            raise ValueError(
                f"--{option} {value!r}: no line breaks and control characters, and not nothing; it is one word of the batch file"
            )
    for line in wanted.setup:
        if CONTROL_OF_LINES.search(line):
            raise ValueError(f"--setup {line!r}: a control character; it is a line of the batch script")
    if top is not None:
        folders = [("--out", top, "\"'\\\\%")]
        if wanted.container_image is not None:
            folders += [("--out", top, ",:"), ("the current folder", here, ",:")]
        for option, folder, refused in folders:
            if match := CONTROL.search(str(folder)) or re.search(f"[{re.escape(refused)}]", str(folder)):
                raise ValueError(
                    f"{option} {str(folder)!r}: {match[0]!r} in a path means something else to SLURM; choose a folder without it"
                )
