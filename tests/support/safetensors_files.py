"""Safetensors files taken apart and put together byte by byte, so that they may be damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, header: Any, data: bytes, more: int = 0) -> None:
    """header: JSON, or bytes in its place. more: by how many bytes the file says that it is longer."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) + more) + text + data)
