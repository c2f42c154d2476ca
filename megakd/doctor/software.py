"""Python, the packages that megakd asks for, whether they can be imported, and the compiler that DeepSpeed may need."""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import time
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megakd.doctor.finding import Finding, Place
from megakd.runtime import environment
from megakd.version import __version__

SLOW_IMPORTS = 20.0  # seconds: from a local disk everything is there in about ten
# What for, of pyproject.toml's extras; dev is for who works on megakd.
EXTRAS = {
    "vlm": "language decoders, which answer questions",
    "monitors": "TensorBoard",
    "study": "`megakd report` and the statistics of studies",
}


def python(_: Place) -> Iterator[Finding]:
    asked, _requirements = _declared()
    facts = {"python": platform.python_version(), "megakd": __version__, "commit": environment.commit(), "asked": str(asked)}
    source = f", commit {facts['commit']}" if facts["commit"] else ""
    said = f"Python {facts['python']}, megakd {__version__}{source}"
    if asked.contains(platform.python_version(), prereleases=True):
        yield Finding("python", "ok", said, facts=facts)
    else:
        remedy = "make an environment with another Python: make PYTHON=/path/to/python3.12 install"
        yield Finding("python", "fails", f"{said}, which needs Python {asked}", remedy, facts)


def packages(_: Place) -> Iterator[Finding]:
    """What megakd always needs, one row, and each extra."""
    _asked, requirements = _declared()
    facts, wrong, install = _compared(requirements[""])
    facts["triton"] = environment.version("triton")
    known = ("torch", "deepspeed", "open_clip_torch", "transformers", "bitsandbytes", "triton")
    said = ", ".join(f"{name} {facts[name]}" for name in known if facts[name])
    if wrong:
        yield Finding("packages", "fails", "; ".join(wrong), f"pip install {install}", facts)
    else:
        yield Finding("packages", "ok", f"all {len(requirements[''])} that megakd asks for: {said}", facts=facts)
    for extra, purpose in EXTRAS.items():
        facts, wrong, install = _compared(requirements.get(extra, []))
        if wrong:
            yield Finding(extra, "partly", f"{'; '.join(wrong)}: for {purpose}", f"pip install {install}", facts)
        else:
            here = ", ".join(f"{name} {version}" for name, version in facts.items())
            yield Finding(extra, "ok", f"{here or 'nothing more is asked for'}: for {purpose}", facts=facts)


def _compared(requirements: list[Requirement]) -> tuple[dict[str, str | None], list[str], str]:
    """(versions by name, what is wrong with them, arguments of pip that put it right)."""
    facts: dict[str, str | None] = {}
    wrong, install = [], []
    for asked in requirements:
        facts[asked.name] = version = environment.version(asked.name)
        if version is None:
            wrong.append(f"{asked.name} is not installed")
        elif not asked.specifier.contains(version, prereleases=True):
            wrong.append(f"{asked.name} is {version}, and megakd asks for {asked.specifier}")
        else:
            continue
        install.append(shlex.quote(f"{asked.name}{asked.specifier}"))
    return facts, wrong, " ".join(install)


def _declared() -> tuple[SpecifierSet, dict[str, list[Requirement]]]:
    """(versions of Python, requirements by extra; "" for those that are always needed).

    Of the checkout that this runs from, whose installed metadata may be older, or of the installed package. Raises PackageNotFoundError
    where megakd is neither.
    """
    page = Path(__file__).parents[2] / "pyproject.toml"
    if page.is_file():
        project = tomllib.loads(page.read_text(encoding="utf-8"))["project"]
        lines = {"": project["dependencies"], **project["optional-dependencies"]}
        return SpecifierSet(project["requires-python"]), {extra: [*map(Requirement, names)] for extra, names in lines.items()}
    installed = metadata.distribution("megakd")
    found: dict[str, list[Requirement]] = {"": []}
    for asked in map(Requirement, installed.requires or []):
        extra = re.search(r"extra == ['\"]([^'\"]+)", str(asked.marker))
        found.setdefault(extra[1] if extra else "", []).append(asked)
    return SpecifierSet(installed.metadata["Requires-Python"] or ""), found


def imports(_: Place) -> Iterator[Finding]:
    """All that a run imports. What is installed may not fit together, or lie on a slow disk."""
    seconds: dict[str, float] = {}
    began = last = time.perf_counter()
    import torch  # noqa: F401

    last = _passed(seconds, "torch", last)
    import torchvision  # type: ignore[import-untyped]  # noqa: F401

    last = _passed(seconds, "torchvision", last)
    import megakd.runtime.engine  # noqa: F401

    last = _passed(seconds, "deepspeed", last)
    import open_clip  # noqa: F401

    last = _passed(seconds, "open_clip", last)
    from megakd.training import run  # noqa: F401

    _passed(seconds, "megakd", last)
    whole = time.perf_counter() - began
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    said = f"all that a run imports, in {whole:.1f} s: {parts}"
    facts = {name: round(value, 3) for name, value in seconds.items()}
    if whole < SLOW_IMPORTS:
        yield Finding("imports", "ok", said, facts=facts)
    else:
        remedy = (
            "every rank waits so long at every start: run the same again, as the files are cached then; where it stays slow, end what else "
            "keeps the machine busy, or move the environment from a network's folder to a local disk or into a container's image"
        )
        yield Finding("imports", "slow", said, remedy, facts)


def _passed(seconds: dict[str, float], name: str, since: float) -> float:
    now = time.perf_counter()
    seconds[name] = now - since
    return now


def compiler(_: Place) -> Iterator[Finding]:
    """What DeepSpeed compiles its CPU optimizer with, at the first run that offloads it; compiled losses and towers need it too."""
    import torch
    from torch.utils import cpp_extension

    import megakd.runtime.engine  # noqa: F401 - it puts this environment's programs, ninja among them, on PATH
    from megakd.runtime import compiler as compilers

    command = shlex.split(cpp_extension.get_cxx_compiler())
    there = shutil.which(command[0])
    facts = {"compiler": there, "ninja": shutil.which("ninja"), "cuda_home": cpp_extension.CUDA_HOME}
    what = "the optimizer cannot be offloaded (offload_optimizer) nor losses (kernels.backend) and towers (student.compile) be compiled"
    problem = compilers.of_cpp(command)
    if problem is None and not cpp_extension.is_ninja_available():
        problem = ("no ninja, which torch compiles with", "pip install ninja")
    elif problem is None and torch.cuda.is_available() and cpp_extension.CUDA_HOME is None:
        problem = ("no CUDA compiler (nvcc)", "on a cluster module load cuda; or install the CUDA toolkit and export CUDA_HOME=...")
    if problem is None:
        yield Finding("compiler", "ok", f"{there} and ninja", facts=facts)
    else:
        yield Finding("compiler", "partly", f"{problem[0]}: {what}", problem[1], facts)
