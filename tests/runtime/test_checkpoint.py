"""Checkpoints are complete or absent, whatever happens while one is written."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megakd.runtime import checkpoint, files
from megakd.runtime.checkpoint import CheckpointError, Progress
from megakd.runtime.engine import State
from megakd.runtime.exits import LossNotFinite
from support import edit_json
from support.processes import files_at_most, python
from support.runs import wait_for


def _progress(step: int) -> Progress:
    return Progress(step=step, position=16 * step, seed=3, data=12345)


def _state(step: int, numbers: int = 50) -> State:
    weights = {"clip.a": torch.full((numbers, 2), float(step)), "clip.b": torch.arange(3.0)}
    return State(weights, {f"{moment}/{name}": value + 1 for moment in ("exp_avg", "exp_avg_sq") for name, value in weights.items()}, step)


def _save(run: Path, *steps: int, keep: int = 5, numbers: int = 50) -> list[Path]:
    return [checkpoint.save(run, _progress(step), _state(step, numbers), keep) for step in steps]


def _steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoint.available(run)]


def _latest(run: Path) -> tuple[Path | None, list[str]]:
    said: list[str] = []
    return checkpoint.latest_valid(run, said.append), said


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    (path,) = _save(tmp_path, 7)
    progress, state = checkpoint.load(path)
    assert progress == _progress(7)
    assert state.updates == 7
    for found, saved in ((state.weights, _state(7).weights), (state.moments, _state(7).moments)):
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert checkpoint.load_weights(path)[1].keys() == state.weights.keys()


def test_what_objectives_keep_is_saved_beside_the_weights_and_verified_like_them(tmp_path: Path) -> None:
    kept = {"feature.mean": torch.arange(4.0), "feature.step": torch.tensor(7)}
    (without,) = _save(tmp_path / "without", 7)
    assert not (without / "objectives.safetensors").exists()
    assert checkpoint.load(without)[1].objectives == {}
    path = checkpoint.save(tmp_path / "with", _progress(7), replace(_state(7), objectives=kept), 5)
    found = checkpoint.load(path)[1].objectives
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    save_file({"feature.mean": torch.zeros(4)}, path / "objectives.safetensors")
    with pytest.raises(CheckpointError, match=r"objectives\.safetensors is missing or was changed"):
        checkpoint.load(path)
    with pytest.raises(LossNotFinite, match=r"feature\.mean became NaN or infinite"):
        checkpoint.save(tmp_path / "with", _progress(8), replace(_state(8), objectives={"feature.mean": torch.tensor(float("nan"))}), 5)


def test_the_newest_few_stay(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 3, 4, keep=2)
    assert _steps(tmp_path) == [3, 4]
    assert [entry.name for entry in checkpoint.folder_of(tmp_path).iterdir() if entry.name.startswith(".")] == []


def test_what_a_kill_before_the_pruning_left_is_pruned_at_the_next_start(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 3, 4)
    checkpoint.prune(tmp_path, 2)
    assert _steps(tmp_path) == [3, 4]


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    checkpoint.save(tmp_path, _progress(1), _state(9), 5)
    assert checkpoint.load(checkpoint.available(tmp_path)[0])[1].updates == 9


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("weights.safetensors", b""),
        ("moments.safetensors", None),
        ("state.json", b"{"),
        ("state.json", b"{}"),
        ("state.json", b"[]"),
        ("state.json", b"\xff\xfe"),
        ("state.json", b"[" * 10**5),
        ("state.json", b'{"step": ' + b"9" * 10**5 + b"}"),
        ("state.json", b" " * (2 << 20)),
        ("state.json", None),
    ],
    ids=lambda value: value[:9] if isinstance(value, bytes) else value,
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(tmp_path: Path, file: str, content: bytes | None) -> None:
    older, newest = _save(tmp_path, 1, 2)
    if content is None:
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(content)
    path, said = _latest(tmp_path)
    assert path == older
    assert len(said) == 1
    assert str(newest) in said[0]
    with pytest.raises(CheckpointError, match=newest.name):
        checkpoint.load(newest)


def test_one_changed_byte_is_noticed(tmp_path: Path) -> None:
    older, newest = _save(tmp_path, 1, 2)
    with (newest / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert _latest(tmp_path)[0] == older


def _rewritten(path: Path, formerly: bool, **changes: object) -> None:
    """A checkpoint's state.json with other values; formerly: as versions wrote it that knew no checksum of it."""
    edit_json(path / "state.json", **changes)
    if formerly:
        edit_json(path / "state.json", lambda content: content.pop("sha256"), format=1)


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (path,) = _save(tmp_path, 7)
    _rewritten(path, formerly=True)
    assert checkpoint.load(path)[0] == _progress(7)
    assert _latest(tmp_path) == (path, [])


@pytest.mark.parametrize("formerly", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        *({"step": 19}, {"step": 2.0}, {"step": True}, {"updates": 1}, {"position": -3}, {"seed": None}, {"data": "x"}),
        *({"files": {}}, {"files": {"weights.safetensors": 1, "moments.safetensors": 2}}),
    ],
    ids=str,
)
def test_a_changed_state_is_passed_over(tmp_path: Path, changes: dict[str, object], formerly: bool) -> None:
    older, newest = _save(tmp_path, 1, 2)
    _rewritten(newest, formerly, **changes)
    path, said = _latest(tmp_path)
    assert path == older
    assert "state.json" in said[0]
    with pytest.raises(CheckpointError, match="resume from another checkpoint"):
        checkpoint.load(newest)


@pytest.mark.parametrize("key", ["format", "step", "position", "seed", "data", "updates", "files", "sha256"])
def test_a_missing_key_of_the_state_is_passed_over(tmp_path: Path, key: str) -> None:
    older, newest = _save(tmp_path, 1, 2)
    edit_json(newest / "state.json", lambda content: content.pop(key))
    assert _latest(tmp_path)[0] == older


def _forge(path: Path, file: str, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors, with their checksums everywhere: what no run of ours saves."""
    save_file(tensors, path / file)

    def sign(content: dict[str, Any]) -> None:
        content["files"][file] = {"bytes": (path / file).stat().st_size, "sha256": files.sha256(path / file)}
        del content["sha256"]
        content["sha256"] = files.json_sha256(content)

    edit_json(path / "state.json", sign)


Tensors = dict[str, torch.Tensor]
# What is done to the weights and the moments.
USELESS: dict[str, Callable[[Tensors, Tensors], object]] = {
    "NaN": lambda weights, moments: weights["clip.a"][3, 1].fill_(torch.nan),
    "bf16": lambda weights, moments: weights.update({"clip.a": weights["clip.a"].bfloat16()}),
    "another shape": lambda weights, moments: moments.update({"exp_avg/clip.a": torch.zeros(3)}),
    "a negative second moment": lambda weights, moments: moments["exp_avg_sq/clip.b"][1].fill_(-1),
    "a missing moment": lambda weights, moments: moments.pop("exp_avg/clip.b"),
    "an unknown moment": lambda weights, moments: moments.update({"exp_avg/clip.c": torch.zeros(3)}),
}


@pytest.mark.parametrize("what", USELESS)
def test_a_whole_checkpoint_that_nobody_can_go_on_from_is_passed_over(tmp_path: Path, what: str) -> None:
    older, newest = _save(tmp_path, 1, 2)
    weights, moments = _state(2).weights, _state(2).moments
    USELESS[what](weights, moments)
    _forge(newest, "weights.safetensors", weights)
    _forge(newest, "moments.safetensors", moments)
    path, said = _latest(tmp_path)
    assert path == older
    assert str(newest) in said[0]


def test_a_folder_whose_name_is_no_step_is_no_checkpoint(tmp_path: Path) -> None:
    (path,) = _save(tmp_path, 1)
    (checkpoint.folder_of(tmp_path) / "step_00000002.copy").mkdir()
    (checkpoint.folder_of(tmp_path) / "step_newest01").mkdir()
    assert _latest(tmp_path) == (path, [])
    assert _steps(tmp_path) == [1]


def test_another_format_is_refused_by_number(tmp_path: Path) -> None:
    (path,) = _save(tmp_path, 1)
    edit_json(path / "state.json", format=99)
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load(path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        checkpoint.load(tmp_path)
    assert _latest(tmp_path) == (None, [])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["weights", "moments"])
def test_a_state_that_is_not_finite_is_not_saved_and_removes_nothing(tmp_path: Path, part: str, value: float) -> None:
    (earlier,) = _save(tmp_path, 1)
    state = _state(2)
    next(iter(vars(state)[part].values()))[3, 1] = value
    with pytest.raises(LossNotFinite, match=r"step 2: not saved, because (exp_avg/)?clip\.a became NaN"):
        checkpoint.save(tmp_path, _progress(2), state, 1)
    assert _latest(tmp_path) == (earlier, [])


def test_what_a_crash_left_half_written_is_ignored_and_cleared(tmp_path: Path) -> None:
    (older,) = _save(tmp_path, 1)
    partial = checkpoint.folder_of(tmp_path) / ".partial_step_00000002"
    partial.mkdir()
    (partial / "weights.safetensors").write_bytes(b"half")
    assert _latest(tmp_path) == (older, [])
    (newer,) = _save(tmp_path, 2)
    assert _latest(tmp_path) == (newer, [])
    assert not partial.exists()


ENDLESS_SAVING = """
import sys, torch
from pathlib import Path
from megakd.runtime import checkpoint
from megakd.runtime.checkpoint import Progress
from megakd.runtime.engine import State
for step in range(1, 100000):
    weights = {"w": torch.full((20000,), float(step))}
    state = State(weights, {"exp_avg/w": weights["w"] + 1, "exp_avg_sq/w": weights["w"] + 2}, step)
    checkpoint.save(Path(sys.argv[1]), Progress(step, step, 0, 0), state, 2)
"""


def test_kill_9_while_saving_always_leaves_a_valid_checkpoint_and_no_damaged_one(tmp_path: Path) -> None:
    process = python("-c", ENDLESS_SAVING, tmp_path)
    try:
        wait_for(lambda: bool(checkpoint.available(tmp_path)), process, seconds=240)
        for _ in range(15):
            # Stopped at a random point of its work, the disk shows what a kill there would leave.
            time.sleep(0.013)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # it stands still, which the signal alone does not say
            path, said = _latest(tmp_path)
            assert path is not None
            assert said == []
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
    path, said = _latest(tmp_path)
    assert path is not None
    assert said == []
    progress, state = checkpoint.load(path)
    assert torch.equal(state.weights["w"], torch.full((20000,), float(progress.step)))


def test_another_architecture_is_refused_with_the_tensors_that_differ(tmp_path: Path) -> None:
    weights = _state(1).weights
    checkpoint.check_fits(tmp_path, weights, {"clip.a": (50, 2), "clip.b": (3,)})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_fits(tmp_path, weights, {"clip.a": (50, 4), "heads.new": (1,)})
    message = str(caught.value)
    assert "clip.a: (50, 4) here, (50, 2) in the checkpoint" in message
    assert "heads.new: (1,) here, absent in the checkpoint" in message
    assert "clip.b: absent here, (3,) in the checkpoint" in message
    assert str(tmp_path) in message


def _assert_refused_and_earlier_is_whole(run: Path, earlier: Path, numbers: int) -> None:
    with pytest.raises(CheckpointError) as caught:
        _save(run, 2, numbers=numbers)
    assert "step_00000002" in str(caught.value)
    assert "free some space" in str(caught.value)
    assert _latest(run) == (earlier, [])
    assert [entry.name for entry in checkpoint.folder_of(run).iterdir()] == [earlier.name]


def test_a_file_that_cannot_grow_fails_the_save_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    (earlier,) = _save(tmp_path, 1)
    with files_at_most(20_000):
        _assert_refused_and_earlier_is_whole(tmp_path, earlier, 20_000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk ({mounted.stderr.strip()}); a file limit stands in for it in the test above")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_fails_the_save_and_leaves_the_earlier_checkpoint(small_disk: Path) -> None:
    (earlier,) = _save(small_disk, 1)
    _assert_refused_and_earlier_is_whole(small_disk, earlier, 80_000)
    (later,) = _save(small_disk, 3)
    assert _latest(small_disk) == (later, [])


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="could not save"):
        _save(tmp_path, 1)
