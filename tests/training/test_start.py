"""What a start does without: modules that a dry run does not import, which is where its processor seconds go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import python_path

ENVIRON = {**os.environ, "PYTHONPATH": python_path()}
# Of decoders, of statistics and tables, of other programs, and of training itself.
UNUSED = (
    *("transformers.modeling_utils", "accelerate", "peft", "bitsandbytes", "megakd.models.vlm.decoder", "megakd.export.bundle"),
    *("scipy", "sklearn", "pandas", "matplotlib", "onnx", "onnxruntime", "tensorboard"),
    *("typer", "submitit", "megakd.training.run", "megakd.training.trainer"),
)


def test_a_dry_run_imports_nothing_of_decoders_of_statistics_and_of_the_fit_loop(recipe_file: Path, tmp_path: Path) -> None:
    code = (
        "import gc, sys; from megakd.training.command import run_command; code = run_command(sys.argv[1:]); "
        f"print(code, gc.isenabled(), sorted({set(UNUSED)} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "--recipe", str(recipe_file), "--dry_run", "--out", str(tmp_path / "run")]
    finished = subprocess.run(command, capture_output=True, text=True, env=ENVIRON, cwd=tmp_path)
    assert finished.stdout.splitlines()[-1:] == ["0 True []"], finished.stdout + finished.stderr


def test_listing_runs_imports_neither_torch_nor_what_stands_on_it(tmp_path: Path) -> None:
    heavy = {"torch", "open_clip", "transformers", "deepspeed", "submitit"}
    code = f"import sys; from megakd import cli; cli.app(sys.argv[1:], standalone_mode=False); print({heavy} & set(sys.modules))"
    finished = subprocess.run(
        [sys.executable, "-c", code, "jobs", str(tmp_path)], capture_output=True, text=True, env=ENVIRON, cwd=tmp_path
    )
    assert finished.stdout.endswith("set()\n"), finished.stdout + finished.stderr
