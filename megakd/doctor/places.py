"""Folders that a run writes to, and the network that it downloads from."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from megakd.doctor.finding import Finding, Place

GB = 1e9
# A checkpoint is weights and AdamW's two moments in float32: of ViT-B/16 with its text tower 150 million of each.
CHECKPOINT = 150_000_000 * 3 * 4
LEAST = 200_000_000  # the smoke recipe's run, with its teacher's
GIANT = 10.2 * GB  # ViT-bigG-14's file
WRITTEN = 32 << 20
SLOW_WRITES = 50e6  # bytes a second: a ViT-B/16's checkpoint then takes 36 s
NETWORK_SECONDS = 4.0


def out(place: Place) -> Iterator[Finding]:
    """The run folder: room for its checkpoints, the speed of a write that is on the disk, and locks against a second job."""
    from megakd.recipe import Checkpoint
    from megakd.runtime.files import check_place

    check_place(place.out, "--out")
    there, free, total = _room(place.out)
    needed = (Checkpoint.model_fields["keep"].default + 1) * CHECKPOINT
    facts = {"folder": str(place.out), "free_bytes": free, "total_bytes": total, "needed_bytes": needed}
    said = f"{place.out}: {free / GB:.1f} GB free"
    if total and free < LEAST:
        yield Finding("out", "fails", f"{said}, too little for the smallest run", "make room there or choose another --out", facts)
        return
    facts["bytes_per_second"], facts["locks"] = _written(there)
    said += f", {facts['bytes_per_second'] / 1e6:.0f} MB/s written" + ("" if facts["locks"] else ", no locks")
    if total and free < needed:
        remedy = "make room there or choose another --out"
        yield Finding("out", "partly", f"{said}; checkpoints of a ViT-B/16 want {needed / GB:.1f} GB", remedy, facts)
    elif facts["bytes_per_second"] < SLOW_WRITES:
        remedy = "choose a faster disk with --out, or save less often: --set checkpoint.every=N"
        yield Finding("out", "slow", f"{said}: a ViT-B/16's checkpoint takes {CHECKPOINT / facts['bytes_per_second']:.0f} s", remedy, facts)
    elif not facts["locks"]:
        yield Finding("out", "partly", said, "see to it that no second job works in one run folder, or choose another file system", facts)
    else:
        yield Finding("out", "ok", said, facts=facts)


def _room(folder: Path) -> tuple[Path, int, int]:
    """(the part of the path that is there, bytes free there, bytes in all: 0 where the file system does not say)."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    disk = shutil.disk_usage(there)
    return there, disk.free, disk.total


def _written(folder: Path) -> tuple[float, bool]:
    """(bytes a second of a synced write, whether files can be locked), by a file that has no name, or loses it at once."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(WRITTEN >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = WRITTEN / (time.perf_counter() - began)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return speed, False
    return speed, True


def caches(place: Place) -> Iterator[Finding]:
    """Where shards, models, compiled operators and temporary files are kept."""
    from huggingface_hub import constants
    from torch.utils import cpp_extension

    operators = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folders = [
        ("cache", place.cache, "--cache", "copies of remote shards and indexes", LEAST),
        ("models", Path(constants.HF_HUB_CACHE), "HF_HOME", "downloaded models; ViT-bigG-14's file has 10 GB", GIANT),
        ("operators", Path(operators), "TORCH_EXTENSIONS_DIR", "DeepSpeed's compiled operators", LEAST),
        ("temporary", Path(tempfile.gettempdir()), "TMPDIR", "temporary files", LEAST),
    ]
    for name, folder, option, purpose, needed in folders:
        if folder is not None:
            yield _cache(name, folder, option, purpose, needed)


def _cache(name: str, folder: Path, option: str, purpose: str, needed: float) -> Finding:
    from megakd.runtime.files import check_place

    named = "name another with --cache (data.cache)" if option == "--cache" else f"name another: export {option}=FOLDER"
    facts = {"folder": str(folder), "free_bytes": None, "needed_bytes": int(needed)}
    try:
        check_place(folder, option)
        _, free, total = _room(folder)
    except (ValueError, OSError) as error:
        reason = str(error).rpartition(";")[0] or str(error)
        return Finding(name, "partly", f"{reason} ({purpose})", named, facts)
    facts["free_bytes"] = free
    said = f"{folder}: {free / GB:.1f} GB free for {purpose}"
    if total and free < needed:
        return Finding(name, "partly", said, f"make room there, or {named}", facts)
    return Finding(name, "ok", said, facts=facts)


def network(_: Place) -> Iterator[Finding]:
    """One short request to the hub, unless HF_HUB_OFFLINE says that there is none."""
    from huggingface_hub import constants, get_session

    from megakd.runtime import failures

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "ok", "not tried, as HF_HUB_OFFLINE is set: models are files or in the cache", facts={"offline": True})
        return
    session = get_session()
    answers: list[int | str] = []

    def ask() -> None:
        try:
            answers.append(session.head(constants.ENDPOINT, timeout=NETWORK_SECONDS).status_code)
        except Exception as error:  # of the client's own kinds
            answers.append((str(error).strip().splitlines() or [type(error).__name__])[0])

    # Daemon: the look-up of a name keeps to no time limit, and nobody waits for it at the end.
    asking = threading.Thread(target=ask, daemon=True)
    began = time.perf_counter()
    asking.start()
    asking.join(NETWORK_SECONDS + 1)
    answer = answers[0] if answers else f"no answer in {NETWORK_SECONDS + 1:.0f} s"
    facts = {"offline": False, "endpoint": constants.ENDPOINT, "answer": answer, "seconds": time.perf_counter() - began}
    if isinstance(answer, int) and answer < 500:
        yield Finding("hub", "ok", f"{constants.ENDPOINT} answers in {facts['seconds']:.1f} s", facts=facts)
    else:
        said = f"{constants.ENDPOINT} does not answer ({answer}): models that a recipe names by a tag cannot be downloaded"
        yield Finding("hub", "partly", said, failures.NETWORK, facts)
