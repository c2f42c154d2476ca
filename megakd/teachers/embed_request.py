"""What `megakd embed` is asked for, without torch. The command has an option for each field, of which `metadata` tells the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class EmbedRequest:
    """The store to write or to check. Raises ValueError naming the flag of a value that no store has."""

    out: Path = field(
        metadata={"help": "folder of the store; what an interrupted job left there is kept. data.train, with --check: the shards hold them"}
    )
    views: int = field(default=1, metadata={"help": "augmented views of each image; epoch e of a training reads view e mod VIEWS"})
    dtype: str = field(default="bf16", metadata={"help": "bf16, or fp32 for twice the size"})
    # a defect of one sample in a hundred shows with 92 %
    samples: int = field(default=256, metadata={"help": "random samples that --check recomputes"})
    ds_config: str | None = field(default=None, metadata={"metavar": "JSON", "help": "its micro-batch is embedded at once"})

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ValueError(f"--views {self.views}: a store holds at least one view of each image")
        if self.samples < 1:
            raise ValueError(f"--samples {self.samples}: at least one is compared")
        if self.dtype not in ("bf16", "fp32"):
            raise ValueError(f"--dtype {self.dtype}: bf16 or fp32")
