"""What an error is to its user: megakd's own message, a known trouble of the machine with its remedy, or a bug.

`explain` gives the message of the first two kinds; a bug keeps its traceback. An error that goes to another process (of a loader's worker,
of another rank) loses the frames that tell, so `told` notes before whose it is.
"""

from __future__ import annotations

import errno
import pickle
import re
import socket
import traceback
from pathlib import Path
from typing import TypeVar, cast

import torch

import megakd_kernels

NOTE = "raised_by_megakd"
E = TypeVar("E", bound=BaseException)
OURS = (Path(__file__).parents[1], Path(megakd_kernels.__file__).parent)
# A full or read-only disk, a quota, a file too large, no permission, a name that is too long, a file where a folder should be, or back.
STORAGE = "make room there or choose another --out; checkpoints written before are untouched"
PLACE = "check the path and its permissions, or choose another --out; checkpoints written before are untouched"
NETWORK = (
    "check the address and the network of this machine; compute nodes often have none: download beforehand, then set HF_HUB_OFFLINE=1 or "
    "name files"
)
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS), STORAGE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP), PLACE),
    errno.ENOENT: "it is not there, or no longer: put it back, or correct the path",
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "too many files are open at once: raise the limit (ulimit -n 65536), or lower data.workers"
    ),
    errno.EAGAIN: "the system gives no further process or thread: raise the limit (ulimit -u), or lower data.workers",
    errno.ENOMEM: "the machine's memory is used up: lower data.workers or train_micro_batch_size_per_gpu, or ask for more (--mem)",
    **dict.fromkeys((errno.EIO, errno.ESTALE), "the disk or the file server failed: look at its state, then start again"),
    errno.EPIPE: "who read this output has gone",
    errno.EADDRINUSE: "another program has this port: set MASTER_PORT to a free one",
    **dict.fromkeys(
        (
            *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT),
            *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN),
        ),
        NETWORK,
    ),
}
LESS_MEMORY = (
    "lower train_micro_batch_size_per_gpu in the DeepSpeed JSON (the result stays the same, by accumulation), set "
    "student.activation_checkpointing = true, hold the teacher in parts (teacher.mode = 'zero3_int8'), or use more GPUs; `megakd plan` "
    "says what each needs"
)
SHARED_MEMORY = (
    "loader processes hand over batches in /dev/shm, and it is full: give the container more (docker --shm-size=16g or --ipc=host), or "
    "lower data.workers; 0 needs none"
)
LOST_PEER = r"Connection (closed|reset|refused)|Broken pipe|Socket closed|remote process exited|Application timeout caused pair closure"
# What libraries raise as RuntimeError or a class of their own, by their text: (pattern, remedy).
KNOWN = (
    (r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory|Cannot allocate memory|cudaErrorMemoryAllocation", LESS_MEMORY),
    (
        r"killed by signal: Bus error|out of shared memory|(torch_|shared memory|/dev/shm).*No space left|unable to (mmap|write to file)",
        SHARED_MEMORY,
    ),
    (
        r"DataLoader worker \(pid",
        "a decoding process was ended from outside, most often because memory ran out: lower data.workers, or ask for more memory (--mem)",
    ),
    (
        r"Too many open files|received 0 items of ancdata",
        "too many files are open at once: raise the limit (ulimit -n 65536), or lower data.workers",
    ),
    (
        r"[Ee]rror building extension|Unable to JIT load|CUDA_HOME does not exist|[Nn]inja is required|Unable to find a C\+\+ compiler",
        "DeepSpeed compiles this operator at its first use and could not: load a C++ compiler (and CUDA's, on a GPU), with ninja on PATH; "
        "slurm/env.sh is the place; or leave out the offload that asks for it",
    ),
    (
        r"/c[a-z2-7]{40,}[\w.]*\.so: (file too short|invalid ELF header)",  # names that torch's compiler gives, wherever its cache lies
        "a process that was killed has left half a file in torch's cache of compiled code: remove that file's folder, or all of "
        "TORCHINDUCTOR_CACHE_DIR, which is made anew, and start again",
    ),
    (
        LOST_PEER,
        "another rank has ended or cannot be reached: its own last lines say why; it may have been killed for memory",
    ),
    (r"Timed out waiting|Operation timed out|collective.*[Tt]imeout|Wait timeout", "another rank did not answer: look at the logs of all"),
)
# Libraries whose errors are those of a network.
NETWORKED = ("requests", "urllib3", "httpx", "httpcore", "huggingface_hub", "aiohttp", "ssl", "urllib")


def explain(error: BaseException) -> str | None:
    """One message with a remedy, or None for a bug. Libraries wrap what megakd raises within them, so causes count as well."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    for cause in chain:
        if isinstance(cause, ValueError) and is_ours(cause):
            return str(cause)
    for cause in chain:
        if explanation := _known(cause):
            return explanation
    return None


def is_ours(error: BaseException) -> bool:
    """Whether megakd itself raised it, whose ValueErrors are written for users."""
    marked = getattr(error, NOTE, None)
    if marked is not None:
        return bool(marked)
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(Path(frames[-1].filename).is_relative_to(folder) for folder in OURS)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank has gone."""
    return isinstance(error, RuntimeError) and re.search(LOST_PEER, str(error)) is not None


def told(error: E) -> E:
    """The error with a note whose it is, to go to another process; one of its text where it cannot be pickled."""
    setattr(error, NOTE, is_ours(error))
    try:
        type(error)(*error.args)  # as it will be made again there
        pickle.dumps(error)
        return error
    except Exception:  # of whatever its class asks for
        pass
    kind = next(kind for kind in (ValueError, OSError, MemoryError, ImportError, Exception) if isinstance(error, kind))
    plain = kind(str(error))
    setattr(plain, NOTE, is_ours(error))
    return cast(E, plain)


def _known(error: BaseException) -> str | None:
    text = _first_lines(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text}\nOut of GPU memory: {LESS_MEMORY}"
    if isinstance(error, MemoryError):
        return f"out of memory{f' ({text})' if text else ''}: {REMEDIES[errno.ENOMEM]}"
    if isinstance(error, ImportError):
        return _not_installed(error, text)
    if type(error).__module__.split(".")[0] in NETWORKED or isinstance(error, (socket.gaierror, TimeoutError)):
        return f"{text}; {NETWORK}"
    if isinstance(error, RuntimeError):
        # the whole text: of a DataLoader's error the cause is in the last line
        return next((f"{text}; {remedy}" for pattern, remedy in KNOWN if re.search(pattern, str(error))), None)
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno == errno.ENOSPC and "/dev/shm" in str(error.filename or text):
            return f"{text}; {SHARED_MEMORY}"
        return f"{text}; {REMEDIES.get(error.errno, 'look at what the system says of it, then start again')}"
    return None


def _not_installed(error: ImportError, text: str) -> str | None:
    name = (error.name or "").split(".")[0]
    if not name or name in ("megakd", "megakd_kernels"):
        return None
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {name!r} is needed for this and not installed: pip install {name} in the environment that runs megakd"
    return f"the Python package {name!r} cannot be loaded ({text}): install a version of it that fits the others (pip install -U {name})"


def _first_lines(error: BaseException, most: int = 600) -> str:
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Caught "):  # of a worker: its message comes after the frames
        lines = lines[-1:]
    kept = [line for line in lines[:4] if line.strip()]
    return "\n".join(kept)[:most] or type(error).__name__
