"""All that the doctor looks at, in order; whatever a look raises is a finding. Nothing is changed, and no file stays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from megakd.doctor import cluster, loader, machine, places, ranks, software, speed
from megakd.doctor.finding import Finding, Mark, Place


class Probe(NamedTuple):
    """One look. when_broken: the mark where it raises."""

    topic: str
    name: str
    look: Callable[[Place], Iterator[Finding]]
    when_broken: Mark = "fails"


PROBES = (
    Probe("versions", "python", software.python),
    Probe("versions", "packages", software.packages),
    Probe("versions", "imports", software.imports),
    Probe("devices", "processors", machine.processors),
    Probe("devices", "memory", machine.memory, "partly"),
    Probe("devices", "gpus", machine.gpus),
    Probe("devices", "precision", machine.precision),
    Probe("ranks", "launcher", ranks.launcher),
    Probe("ranks", "gloo", ranks.gloo),
    Probe("ranks", "nccl", ranks.nccl),
    Probe("loader", "shared_memory", loader.shared_memory),
    Probe("loader", "open_files", loader.open_files),
    Probe("loader", "processes", loader.processes),
    Probe("kernels", "losses", speed.losses),
    Probe("kernels", "int8", speed.int8),
    Probe("kernels", "compiler", software.compiler, "partly"),
    Probe("slurm", "cluster", cluster.cluster, "partly"),
    Probe("slurm", "job", cluster.job, "partly"),
    Probe("disk", "out", places.out),
    Probe("disk", "caches", places.caches, "partly"),
    Probe("network", "hub", places.network, "partly"),
)
TOPICS = tuple(dict.fromkeys(probe.topic for probe in PROBES))


class Examined(NamedTuple):
    """The findings of one probe and the seconds that it took."""

    topic: str
    findings: list[Finding]
    seconds: float


def examine(place: Place, topics: Sequence[str] = TOPICS) -> Iterator[Examined]:
    """Look at everything of these topics, one probe after the other. Raises ValueError for an unknown topic, and nothing else."""
    unknown = [topic for topic in topics if topic not in TOPICS]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: unknown; there are {', '.join(TOPICS)}")
    return _examined(place, [probe for probe in PROBES if probe.topic in topics])


def _examined(place: Place, probes: Sequence[Probe]) -> Iterator[Examined]:
    errors: dict[str, str] = {}
    for probe in probes:
        began = time.perf_counter()
        findings: list[Finding] = []
        try:
            findings.extend(probe.look(place))
        except Exception as error:
            findings.append(_raised(probe, error, errors))
        yield Examined(probe.topic, findings, time.perf_counter() - began)


def _raised(probe: Probe, error: Exception, earlier: dict[str, str]) -> Finding:
    """earlier: the probes that raised, by their errors' texts: one cause is explained once."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    facts = {"error": text}
    if text in earlier:
        return Finding(probe.name, probe.when_broken, f"could not be looked at, as {earlier[text]}", f"as of {earlier[text]}", facts)
    earlier[text] = f"{probe.topic}.{probe.name}"
    said, remedy = explained(error)
    return Finding(probe.name, probe.when_broken, said, remedy, facts)


def explained(error: Exception) -> tuple[str, str]:
    """(what is wrong, the remedy) of an error, by what training would say of it."""
    text = " ".join(str(error).split()) or type(error).__name__
    try:
        from megakd.runtime import failures  # torch's, which may be what is missing

        known = failures.explain(error)
    except ImportError:
        known = None
    if known is None:
        remedy = "install megakd's packages anew: make install, or pip install -e . in its repository"
        return f"{type(error).__name__}: {text}", remedy if isinstance(error, ImportError) else "a fault of megakd's: please report it"
    # "what; remedy", or "what: remedy": so megakd speaks to users
    what, _, remedy = known.partition("; ") if "; " in known else known.rpartition(": ")
    return " ".join((what or known).split()), " ".join(remedy.split())
