"""What the doctor says of one thing, and what it is asked about."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# ok; works, slower than it could; some recipes would fail; every training of ordinary size would fail
Mark = Literal["ok", "slow", "partly", "fails"]


@dataclass(frozen=True)
class Finding:
    """said: what is here, for people. remedy: what to do where the mark is not ok. facts: the same for programs, plain JSON."""

    name: str
    mark: Mark
    said: str
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a run would write. out: its folder. cache: data.cache, where a recipe names one."""

    out: Path
    cache: Path | None = None
