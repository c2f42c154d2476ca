"""What libraries say about correctness reaches the user; what a recipe asked for is not warned of."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs import KD, environment, train

# Each line is what a library would say, from where it says it.
SAID = """
import logging, warnings
from megakd.runtime.console import quiet_libraries
quiet_libraries()
def said_by(module, text, category=UserWarning):
    names = {"__name__": module, "text": text, "category": category}
    exec(compile("import warnings\\nwarnings.warn(text, category)", "x.py", "exec"), names)
said_by("open_clip.factory", "QuickGELU mismatch between final model config and pretrained tag")
said_by("torch.optim.lr_scheduler", "lr_scheduler.step() before optimizer.step()")
said_by("deepspeed.runtime.engine", "gradients overflow")
logging.warning("Model configuration not found, returning default SimpleTokenizer.")
said_by("torch.storage", "TypedStorage is deprecated", FutureWarning)
"""


def test_correctness_warnings_of_libraries_are_heard_and_their_deprecations_are_not() -> None:
    found = subprocess.run([sys.executable, "-c", SAID], env=environment(), capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    for heard in ("QuickGELU mismatch", "lr_scheduler.step()", "gradients overflow", "returning default SimpleTokenizer"):
        assert heard in found.stderr
    assert "TypedStorage" not in found.stderr


WORKERS = """
import sys, warnings
from megakd.data.stream import WorkerStream
class Odd:
    def __getitems__(self, numbers):
        for number in numbers:
            warnings.warn(f"Corrupt EXIF data of image {number}")
        return numbers
stream = WorkerStream(Odd(), [range(start, start + 4) for start in range(0, 40, 4)], 2, False)
list(stream)
"""


def test_a_warning_about_files_is_said_once_whatever_the_number_of_workers_and_files() -> None:
    found = subprocess.run([sys.executable, "-c", WORKERS], env=environment(), capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("Corrupt EXIF data") == 1


@pytest.fixture(scope="module")
def finished(recipe_file: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    ended = train(recipe_file, "--out", out, sets=(*KD, f"evaluation.retrieval={{ test = '{world}/test/*.tar' }}"))
    assert ended.code == 0, ended.err
    assert ended.err == ""
    return out


def test_evaluate_does_not_speak_of_random_weights(finished: Path) -> None:
    command = [sys.executable, "-m", "megakd.cli", "evaluate", str(finished)]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert "randomly" not in found.stdout + found.stderr
    assert "pretrained" not in found.stdout + found.stderr


def test_open_clips_other_words_are_heard_while_a_model_is_built(caplog: pytest.LogCaptureFixture) -> None:
    from megakd.models import clip

    with clip._without_warnings_of_random_weights(), caplog.at_level(logging.WARNING):
        logging.warning("No pretrained weights loaded for model 'x'. Model initialized randomly.")
        logging.warning("Multiple checkpoints found in /x: ['a', 'b']. Using 'a'.")
    assert [record.message[:20] for record in caplog.records] == ["Multiple checkpoints"]
