"""What `megakd plan --sweep` compares and assumes. `megakd plan` has an option for each field, of which `metadata` tells the rest."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from megakd.planning import rates
from megakd.planning.cluster import Cluster


def _flag(name: str, default: Any, text: str) -> Any:
    return field(default=default, metadata={"flag": f"--{name}", "help": f"with --sweep: {text}"})


@dataclass(frozen=True)
class Scaling:
    """What a sweep assumes beside the plan. Shares are of the makers' peaks, see `rates`; hops from NCCL's table, of its Simple protocol.

    images: of one loader process; 813 a second of two were measured on two cores of an AMD EPYC (`megakd bench loader`, faed39a).
    """

    sweep: str | None = field(default=None, metadata={"help": "compare these numbers of GPUs, 8,64,512,4096"})
    scaling: str = _flag("scaling", "strong", "strong: the recipe's batch at every count; weak: that of the smallest count times GPUs")
    forward_share: float = _flag("forward_share", rates.FORWARD_SHARE, "of the peak in the teacher's forward")
    training_share: float = _flag("training_share", rates.TRAINING_SHARE, "of the peak in the student's step")
    loss_share: float = _flag("loss_share", rates.LOSS_SHARE, "of the peak in losses")
    link_share: float = _flag("link_share", rates.LINK_SHARE, "of the links in collectives")
    overlap: float = _flag("overlap", 0.5, "of the communication that can run beside computing, the share that does")
    node_link: float | None = _flag("node_link", None, "GB/s, one direction, of a GPU to its node; default: that of --gpu")
    network: float | None = _flag("network", None, "GB/s, one direction, of a GPU's network card; default: that of --gpu")
    start_us: float = _flag("start_us", 8.4, "microseconds to start a collective")
    hop_us: float = _flag("hop_us", 3.4, "microseconds of a hop in a node")
    network_hop_us: float = _flag("network_hop_us", 9.6, "microseconds of a hop between nodes")
    images: float = _flag("images", 400.0, "images/s that one of data.workers prepares; 0: the loader never makes a step wait")

    def check(self, cluster: Cluster) -> tuple[int, ...]:
        """The counts, smallest first; empty without --sweep. Raises ValueError naming the flag."""
        flags = {one.name: one.metadata.get("flag", f"--{one.name}") for one in fields(self)}
        if self.sweep is None:
            if given := [flags[one.name] for one in fields(self) if getattr(self, one.name) != one.default]:
                raise ValueError(f"{given[0]}: goes with --sweep, which compares numbers of GPUs; add --sweep 8,64 or remove it")
            cluster.check()
            return ()
        if cluster.gpus:
            raise ValueError(f"--gpus {cluster.gpus}: --sweep {self.sweep} says how many; remove one of the two")
        if self.scaling not in ("strong", "weak"):
            raise ValueError(f"--scaling {self.scaling!r}: strong or weak")
        for name in ("forward_share", "training_share", "loss_share", "link_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{flags[name]} {getattr(self, name)}: give a share of the peak, above 0 and up to 1")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"--overlap {self.overlap}: give a share, 0 to 1")
        for name in ("node_link", "network"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{flags[name]} {value}: give a positive number")
        for name in ("start_us", "hop_us", "network_hop_us", "images"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{flags[name]} {getattr(self, name)}: give a number from 0 on")
        replace(cluster, gpus=1).check()
        return _counts(self.sweep, cluster.per_node)


def _counts(sweep: str, per_node: int) -> tuple[int, ...]:
    counts = []
    for word in sweep.split(","):
        if not word.strip().isdecimal() or int(word) < 1:
            raise ValueError(f"--sweep {sweep}: {word.strip()!r} is not a number of GPUs; give whole numbers with commas between, 8,64,512")
        counts.append(int(word))
    if uneven := [count for count in counts if count > per_node and count % per_node]:
        lower = uneven[0] // per_node * per_node
        raise ValueError(
            f"--sweep {sweep}: {uneven[0]} GPUs do not fill nodes of {per_node}; use {lower} or {lower + per_node}, or say --gpus_per_node"
        )
    if len(set(counts)) < len(counts):
        raise ValueError(f"--sweep {sweep}: a count stands twice; remove it")
    return tuple(sorted(counts))
