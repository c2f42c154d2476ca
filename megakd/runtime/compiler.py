"""What torch.compile needs of this machine, and how many seconds this process has spent in it.

Only this module knows torch's callbacks around a compilation. torch keeps what it compiled in TORCHINDUCTOR_CACHE_DIR, by default a folder
of the user's below the temporary one, on each machine its own: the next start reads most of it there.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import time
import types
from collections.abc import Callable
from typing import Any

import torch

from megakd.runtime import collectives
from megakd.runtime.launch import World

SECONDS = 60.0  # in which a compiler has looked at the headers
INCLUDED = "#include <Python.h>\n#include <omp.h>\n"
INSTALL = "apt-get install g++ (dnf install gcc-c++, on a cluster module load gcc), or name one: export CXX=..."
Problem = tuple[str, str]  # what is wrong, and the remedy

_spent = 0.0
_since: float | None = None
_listens = False
_made: list[str] = []


def lacking(world: World) -> Problem | None:
    """As `missing`, of the first rank that lacks something. A collective: the ranks compile all or none."""
    return next(filter(None, collectives.everyones(missing(world.device), world)), None)


def missing(device: torch.device) -> Problem | None:
    """Why nothing can be compiled for this device; None where it can. Compiles nothing.

    For a CPU torch writes C++, which $CXX or g++ compiles; for a GPU Triton, which links its launchers with $CC, gcc or clang.
    """
    if device.type != "cuda":
        return of_cpp(shlex.split(os.environ.get("CXX") or "g++"))
    if importlib.util.find_spec("triton") is None:
        return "no triton", "pip install triton"
    found = next(filter(None, map(shutil.which, (os.environ.get("CC") or "gcc", "clang"))), None)
    if found is None:
        return "no C compiler (gcc), which Triton links with", INSTALL.replace("CXX", "CC").replace("g++", "gcc")
    return _headers([found, "-x", "c"], INCLUDED.splitlines(keepends=True)[0], variable="CC")


def of_cpp(command: list[str]) -> Problem | None:
    """What keeps a C++ compiler, of this command, from what torch and DeepSpeed compile; None for one that is fit."""
    there = shutil.which(command[0])
    return (f"no C++ compiler ({command[0]})", INSTALL) if there is None else _headers([there, *command[1:], "-x", "c++", "-fopenmp"])


def _headers(command: list[str], included: str = INCLUDED, variable: str = "CXX") -> Problem | None:
    reason = refusal(command, included)
    if reason is None:
        return None
    python = "apt-get install python3-dev (dnf install python3-devel)"
    return f"{command[0]}: {reason}", python if "Python.h" in reason else f"install a whole compiler, or export {variable}=..."


def refusal(command: list[str], included: str = INCLUDED) -> str | None:
    """The compiler's first error on these headers; None where it takes them. Writes nothing."""
    flags = ["-fsyntax-only", "-I", sysconfig.get_paths()["include"], "-"]
    try:
        done = subprocess.run([*command, *flags], input=included, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"did not answer in {SECONDS:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return next((line for line in lines if "error" in line), f"exit code {done.returncode}")


def compiled(function: Callable[..., torch.Tensor], what: str) -> Callable[..., torch.Tensor]:
    """`function` by torch.compile; its first calls compile it. what: it is, for `record`.

    Each call of this gives another function to torch, which remembers shapes and graphs by the code object: a tower with texts of 77 tokens
    would otherwise be compiled for any number of them, because images of 50 were seen by the same class of blocks. Random numbers are
    torch's own, so that dropout draws what it draws without compilation.
    """
    _listen()
    _made.append(what)
    return torch.compile(_copied(function, what), options={"fallback_random": True})


def _copied(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    if not isinstance(function, types.FunctionType):
        return function
    code = function.__code__.replace(co_name=f"{function.__name__} ({what})")
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def seconds() -> float:
    """Spent in compilations, on whichever thread, since `compiled` was first called in this process; else 0."""
    return _spent


def record() -> dict[str, Any] | None:
    """What was compiled in this process and in how many seconds so far; None for nothing."""
    return {"what": list(_made), "seconds": round(_spent, 1)} if _made else None


def forget() -> None:
    """Drop what was compiled, with the weights that it holds, for the next run in this process."""
    global _spent, _listens
    if _made:
        torch.compiler.reset()  # which forgets who listens as well
        _made.clear()
        _spent, _listens = 0.0, False


def _listen() -> None:
    global _listens
    if not _listens:
        from torch._dynamo.callback import on_compile_end, on_compile_start  # 2 s, for who compiles alone

        on_compile_start(_begin)
        on_compile_end(_end)
        _listens = True


def _begin(_: object) -> None:
    global _since
    _since = time.perf_counter()


def _end(_: object) -> None:
    global _spent, _since
    if _since is not None:
        _spent, _since = _spent + time.perf_counter() - _since, None
