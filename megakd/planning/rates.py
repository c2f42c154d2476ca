"""How fast devices compute and talk: makers' peaks, and what share of them a training job gets. Estimates, never measured here.

Legend: every rate is a second's: FLOPs, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """Peaks by the maker: dense bf16 products, memory, links to GPUs of the node and to the network, one direction a GPU each."""

    name: str
    flops: float
    memory: float
    node: float
    network: float


# H100 and H200 SXM: 989 TFLOP/s, NVLink 4 at 450 GB/s a direction, a 400 Gb/s network card a GPU; A100 SXM: 312, 300 and 200 Gb/s;
# B200: 2250, 900, 400 Gb/s. "cpu" is one core with AVX-512 and a gloo loopback, to plan what a laptop's smoke test does.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312 * TERA, 2039 * GIGA, 300 * GIGA, 25 * GIGA),
        Gpu("h100", 989 * TERA, 3350 * GIGA, 450 * GIGA, 50 * GIGA),
        Gpu("h200", 989 * TERA, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
        Gpu("b200", 2250 * TERA, 8000 * GIGA, 900 * GIGA, 50 * GIGA),
        Gpu("cpu", 0.1 * TERA, 20 * GIGA, 1 * GIGA, 1 * GIGA),
    )
}

# Assumptions, as shares of the peak. Forward and backward of large ViTs in bf16 reach 40 to 50 % of an H100; losses are many small
# products beside elementwise work; ring collectives reach about 70 % of a link.
FORWARD_SHARE, TRAINING_SHARE, LOSS_SHARE, LINK_SHARE, MEMORY_SHARE = 0.5, 0.4, 0.2, 0.7, 0.7
# Int8 as bf16: twice the peak, spent on quantising activations until a measurement says otherwise.
INT8_SPEEDUP = 1.0
# What offloaded tensors take to a GPU, PCIe 4 x16 in practice, and a GPU's share of the host's memory for the CPU's AdamW.
HOST_LINK, HOST_MEMORY = 20 * GIGA, 20 * GIGA
# AdamW reads gradient, weight and two moments in fp32 and writes three of them.
ADAMW_BYTES = 28


def gpu(name: str) -> Gpu:
    """Raises ValueError for an unknown one, with the nearest."""
    if name not in GPUS:
        from megakd.recipe.texts import did_you_mean  # pydantic's half second, which `megakd --help` does not wait for

        raise ValueError(f"--gpu {name!r}: unknown; {did_you_mean(name.lower(), GPUS, 0.3)}known: {', '.join(GPUS)}")
    return GPUS[name]


@dataclass(frozen=True)
class Seconds:
    """The expected split of a step. communication is not hidden behind computation here; `total` with all of it is an upper bound."""

    teacher: float
    student: float
    loss: float
    communication: float
    update: float

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.loss + self.communication + self.update


def link(of: Gpu, gpus: int, per_node: int) -> float:
    """Bytes a second of a ring over all GPUs: as fast as its slowest link."""
    return LINK_SHARE * (of.node if gpus <= per_node else of.network)
