"""Monitors of the DeepSpeed JSON when a run resumes: no step twice in them.

A resumed run writes the steps past its checkpoint again. DeepSpeed's CSV monitor appends, behind another header line; TensorBoard's begins
a further event file. So what lies past the checkpoint is taken out first, but for a folder that another run writes to. W&B is given the
same run id, and takes no step twice.
"""

from __future__ import annotations

import csv
import io
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megakd.runtime.files import atomic_file, sync, write_text

# In a monitor's folder: whose it is. In a run folder: the id of its W&B run.
OWNER, WANDB_ID = ".megakd_run", "wandb_run_id"
EVENTS = "events.out.tfevents."
SCORES = "Evaluation"
_named: dict[str, str] = {}  # what this module has put into the environment


def go_on(config: Mapping[str, Any], run: Path, samples: int, *, evaluated: bool) -> list[str]:
    """Ready the monitors for a run that goes on after `samples` samples, 0 for one that begins. Rank 0, before the engine is made.

    evaluated: whether the scores of that step stay, or are written again. Returns lines for people on what was left as it is. Raises
    OSError where a file cannot be written.
    """
    lines = []
    for section, clear in (("csv_monitor", _clear_csv), ("tensorboard", _clear_events)):
        folder = _folder(config.get(section))
        if folder is None:
            continue
        owner = _owner(folder)
        if owner not in (None, str(run.absolute())):
            lines.append(f"{section}: {folder} is written to by another run, {owner}, too: give each a job_name of its own")
        elif owner is None and samples == 0 and folder.is_dir() and any(folder.iterdir()):
            lines.append(f"{section}: {folder} holds another run's values, and this one's follow: give each a job_name of its own")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / OWNER).write_text(f"{run.absolute()}\n", encoding="utf-8")
            clear(folder, samples, samples if evaluated else samples - 1)
    wandb = config.get("wandb")
    if isinstance(wandb, Mapping) and wandb.get("enabled"):
        _name_wandb_run(run)
    return lines


def header_is_there(config: Mapping[str, Any]) -> list[str]:
    """Names, without .csv, of the CSV monitor's files that have their header."""
    folder = _folder(config.get("csv_monitor"))
    return [] if folder is None else [path.stem for path in folder.glob("*.csv") if path.stat().st_size]


def _folder(section: Any) -> Path | None:
    """Where DeepSpeed 0.19.8 writes: output_path/job_name. None for a monitor that is off."""
    if not isinstance(section, Mapping) or not section.get("enabled"):
        return None
    return Path(section.get("output_path") or "") / str(section.get("job_name", "DeepSpeedJobName"))


def _owner(folder: Path) -> str | None:
    try:
        return (folder / OWNER).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _clear_csv(folder: Path, samples: int, scored: int) -> None:
    """Keep the first header and the rows up to `samples`, of scores up to `scored`; each place once."""
    for path in folder.glob("*.csv"):
        last = scored if path.name.startswith(f"{SCORES}_") else samples
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8", errors="replace"), newline="")))
        kept = {row[0]: row for row in rows[1:] if len(row) == 2 and row[0].isdecimal() and int(row[0]) <= last}
        with atomic_file(path, alone=True) as partial:
            with partial.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([*rows[:1], *kept.values()])
            sync(partial)


def _clear_events(folder: Path, samples: int, scored: int) -> None:
    """Keep the records of event files up to `samples`, of scores up to `scored`, without a last one that a kill cut."""
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

    for path in folder.glob(f"{EVENTS}*"):
        kept = []
        for record, content in _records(path.read_bytes()):
            event = Event.FromString(content)
            scores = any(value.tag.startswith(f"{SCORES}/") for value in event.summary.value)
            if not event.HasField("summary") or event.step <= (scored if scores else samples):
                kept.append(record)
        with atomic_file(path, alone=True) as partial:
            partial.write_bytes(b"".join(kept))
            sync(partial)


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each whole TFRecord and the bytes in it: length (8), its checksum (4), the bytes, their checksum (4)."""
    place = 0
    while place + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        end = place + 16 + length
        if end > len(content):
            return
        yield content[place:end], content[place + 12 : end - 4]
        place = end


def _name_wandb_run(run: Path) -> None:
    """Let wandb.init, which DeepSpeed calls, go on with this folder's run; it takes no step before its last one."""
    path = run / WANDB_ID
    if not path.exists():
        write_text(path, secrets.token_hex(8) + "\n")
    for name, value in (("WANDB_RUN_ID", path.read_text(encoding="utf-8").strip()), ("WANDB_RESUME", "allow")):
        if os.environ.get(name) in (None, _named.get(name)):  # not the user's own
            os.environ[name] = _named[name] = value
