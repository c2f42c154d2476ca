"""One run of onnxruntime in a process of its own: `python -m megakd.export.onnx_run MODEL ROWS OUT`, three files; the last two are .npy.

onnxruntime's optimisers have ended the whole process on models that its checker takes (1.32 does on a float16 Transpose before a MatMul),
and so would the export end, without a word.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megakd.runtime.extras import library

_GROUP = 3


def embeddings(model: Path, rows: NDArray[np.generic]) -> NDArray[np.float32]:
    """(N, D) of N rows, on the CPU: the first one alone, the others in batches of three. Raises ValueError naming the file."""
    with tempfile.TemporaryDirectory(prefix="megakd-onnx-") as folder:
        given, taken = Path(folder) / "rows.npy", Path(folder) / "embeddings.npy"
        np.save(given, rows)
        command = [sys.executable, "-P", "-m", "megakd.export.onnx_run", *map(str, (model.absolute(), given, taken))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode < 0:
            raise ValueError(
                f"{model.name}: onnxruntime ended with {signal.Signals(-done.returncode).name} on it; take another onnxruntime"
            )
        if done.returncode:
            said = next(reversed(done.stderr.strip().splitlines()), "no message")
            raise ValueError(f"{model.name}: onnxruntime does not run it: {said[:400]}")
        found: NDArray[np.float32] = np.load(taken)
    return found


def _run(model: str, given: str, taken: str) -> None:
    onnxruntime = library("onnxruntime", "an ONNX export needs", "onnx")
    rows = np.load(given)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [rows[:1], *(rows[first : first + _GROUP] for first in range(1, len(rows), _GROUP))]
    np.save(taken, np.concatenate([session.run(None, {name: part})[0] for part in parts]))


if __name__ == "__main__":
    _run(*sys.argv[1:4])
