"""The training loader: the same global batches for any number of ranks and workers, exact resume, bad samples, clean ends."""

import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from open_clip.transform import PreprocessCfg

from megakd.data.pairs import Batch, train_batches
from megakd.data.sampler import Order
from megakd.data.shards import ShardSet
from megakd.data.stream import WorkerStream
from megakd.data.transforms import TowerView
from megakd.recipe import Views
from megakd.runtime import failures
from support import PROGRAMS
from support.loaders import BATCH, TOWERS, stream, take
from support.processes import python
from support.shards import ByteTokenizer, bomb_png, jpeg, open_shards, pair, text_of, write_set, write_tar

pytestmark = pytest.mark.usefixtures("no_process_is_left")


def bad_members() -> list[tuple[str, bytes]]:
    members = [member for number in range(24) for member in pair(f"good{number:02d}", number)]
    return [
        *members,
        *[("cut.jpg", jpeg(1)[:200]), ("cut.txt", b"a cut picture")],
        *[("bomb.png", bomb_png(9_000, 9_000)), ("bomb.txt", b"a bomb")],
        *[("alone.jpg", jpeg(2))],
        *[("empty.jpg", jpeg(3)), ("empty.txt", b"")],
        *[("blank.jpg", jpeg(3)), ("blank.txt", b" \n")],
        *[("latin.jpg", jpeg(4)), ("latin.txt", "é".encode("latin-1"))],
        *[("blind.txt", b"nothing to see")],
    ]


@pytest.fixture
def spoiled(tmp_path: Path) -> ShardSet:
    return open_shards(str(write_tar(tmp_path / "0.tar", bad_members())), max_bad_fraction=0.5)


def same(one: Batch, other: Batch) -> bool:
    tensors = [(one.index, other.index)]
    tensors += [(one.pixels[name], other.pixels[name]) for name in TOWERS] + [(one.tokens[name], other.tokens[name]) for name in TOWERS]
    return (one.position, one.next_position) == (other.position, other.next_position) and all(torch.equal(a, b) for a, b in tensors)


def joined(parts: list[Batch]) -> Batch:
    """The global batch out of the ranks' parts."""
    pixels = {name: torch.cat([part.pixels[name] for part in parts]) for name in TOWERS}
    tokens = {name: torch.cat([part.tokens[name] for part in parts]) for name in TOWERS}
    for part in parts[1:]:
        parts[0].bad.merge(part.bad)
    return Batch(parts[0].position, parts[0].next_position, torch.cat([part.index for part in parts]), pixels, tokens, parts[0].bad)


def test_a_batch_has_a_view_of_every_sample_for_every_tower(clean: ShardSet) -> None:
    (batch,) = take(clean, 1)
    assert batch.pixels["student"].shape == (8, 3, 16, 16)
    assert batch.pixels["teacher"].shape == (8, 3, 24, 20)
    assert all(tensor.dtype == torch.uint8 and tensor.is_contiguous() for tensor in batch.pixels.values())
    assert batch.tokens["teacher"].shape == (8, 20)
    assert batch.tokens["teacher"].dtype == torch.int64
    assert [text_of(row) for row in batch.tokens["teacher"]] == [f"caption {index}" for index in batch.index.tolist()]
    assert (batch.position, batch.next_position, len(batch)) == (0, 8, 8)
    assert batch.bad.to_list()[0] == 8
    assert batch.bad.total == 0
    assert batch.example is None


@pytest.mark.parametrize("which", ["clean", "spoiled"])
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 0), (2, 1), (4, 0), (4, 3)])
def test_any_number_of_ranks_and_workers_gives_the_same_global_batches(request, which: str, world: int, workers: int) -> None:
    shards = request.getfixturevalue(which)
    expected = take(shards, 8)  # more than an epoch
    ranks = [take(shards, 8, rank=rank, world=world, workers=workers) for rank in range(world)]
    for step, whole in enumerate(expected):
        found = joined([rank[step] for rank in ranks])
        assert same(found, whole)
        assert found.bad.to_list() == whole.bad.to_list()


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_gives_the_batches_that_would_have_followed(spoiled: ShardSet, workers: int) -> None:
    whole = take(spoiled, 9)
    resumed = take(spoiled, 5, start=whole[3].next_position, workers=workers)
    assert all(same(one, other) for one, other in zip(whole[4:], resumed, strict=True))


def test_towers_that_see_the_same_share_one_tensor_also_after_a_move(clean: ShardSet) -> None:
    towers = {
        "student": TowerView(PreprocessCfg(size=16), ByteTokenizer(12)),
        "teacher": TowerView(PreprocessCfg(size=16, mean=(0.5, 0.5, 0.5), resize_mode="squash"), ByteTokenizer(12)),
    }
    order = Order(len(clean), BATCH, 0, 4, 3)
    with train_batches(clean, order, Views(), towers, rank=0, world=1, start_position=0, workers=1, pin_memory=True) as batches:
        batch = next(batches)
    assert batch.pixels["student"] is batch.pixels["teacher"]
    assert batch.tokens["student"] is batch.tokens["teacher"]
    moved = batch.to("meta", non_blocking=True)
    assert moved.pixels["student"] is moved.pixels["teacher"]
    assert moved.pixels["student"].device.type == "meta"
    assert moved.position == batch.position


def test_bad_samples_are_replaced_counted_and_logged_outside_workers(spoiled: ShardSet, caplog: pytest.LogCaptureFixture, capfd) -> None:
    batches = take(spoiled, 12, workers=2)
    assert all(len(batch) == BATCH and all(index < 24 for index in batch.index.tolist()) for batch in batches)
    total = batches[0].bad
    for batch in batches[1:]:
        total.merge(batch.bad)
    assert set(total.counts) == {"corrupt_image", "too_large", "missing_caption", "empty_caption", "bad_text", "missing_image"}
    assert total.seen == 12 * BATCH + total.total
    lines = [record.getMessage() for record in caplog.records if record.name == "megakd.data"]
    assert any("too_large" in line and "0.tar: bomb (9000 x 9000 pixels, data.max_pixels = 50000000)" in line for line in lines)
    assert len([line for line in lines if "corrupt_image" in line]) <= 3
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match=r"data\.max_bad_fraction = 0\.01: .*Example: "):
        total.check(0.01, at_least=BATCH)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_of_corrupt_images_is_an_error_and_no_hang(tmp_path: Path, workers: int) -> None:
    members = [member for number in range(10) for member in ((f"{number}.jpg", b"no picture"), (f"{number}.txt", b"text"))]
    shards = open_shards(str(write_tar(tmp_path / "0.tar", members)))
    with stream(shards, workers=workers) as batches:
        with pytest.raises(ValueError, match=r"^no usable sample in 64 attempts for position 0: corrupt_image 64\. Example: .*0\.tar"):
            next(batches)
        assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_in_a_worker_is_raised_with_its_message_and_ends_the_others(clean: ShardSet, workers: int) -> None:
    def broken(texts: list[str]) -> torch.Tensor:
        raise RuntimeError("the tokenizer is broken")

    towers = {"student": TowerView(PreprocessCfg(size=16), broken)}
    order = Order(len(clean), BATCH, 0, 4, 3)
    batches = train_batches(clean, order, Views(), towers, rank=0, world=1, start_position=0, workers=workers, pin_memory=False)
    with pytest.raises(RuntimeError, match="the tokenizer is broken"):
        next(batches)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_raised_by_name_and_is_an_error_for_users(tmp_path: Path, workers: int) -> None:
    shards = open_shards(write_set(tmp_path, 16, 2))
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001\.tar is gone since the run began") as caught:
        take(shards, 3, workers=workers)
    assert "put it back" in str(failures.explain(caught.value))


def test_impossible_settings_are_refused_before_anything_is_read(clean: ShardSet) -> None:
    with pytest.raises(ValueError, match=r"optim\.batch = 8 does not divide by 3 ranks"):
        stream(clean, world=3)
    with pytest.raises(ValueError, match="covers 40 samples, but the shards hold 43"):
        train_batches(clean, Order(40, 8, 0, 4, 3), Views(), TOWERS, rank=0, world=1, start_position=0, workers=0, pin_memory=False)
    with pytest.raises(ValueError, match="start_position = -8"):
        stream(clean, start=-8)


def test_close_ends_the_workers_and_may_come_twice(clean: ShardSet) -> None:
    batches = stream(clean, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    batches.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(StopIteration):
        next(batches)


LOADED_AGAIN = """
import multiprocessing, os
from megakd.data.stream import WorkerStream

class Parents:
    def __getitems__(self, sampled):
        return os.getppid()

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    stream = WorkerStream(Parents(), [range(1)], 1, False)
    print(next(stream) == os.getpid())
    stream.close()
"""


def test_workers_share_the_loaded_libraries_however_their_process_was_started(tmp_path: Path) -> None:
    """A run of a study is started by a fork server, and would start its workers by one of its own, which has loaded nothing."""
    (tmp_path / "program.py").write_text(LOADED_AGAIN)
    process = python(tmp_path / "program.py")
    out, err = process.communicate(timeout=120)
    assert out == "True\n", err


class Remains:
    """In a cycle, which only the garbage collector ends: it notes in which process."""

    def __init__(self, note: Path) -> None:
        self.note, self.itself = note, self

    def __del__(self) -> None:
        self.note.write_text(str(os.getpid()))


class Collecting:
    """A dataset whose worker collects its garbage, and then breaks as a faulty decoder does."""

    def __getitems__(self, sampled: range) -> int:
        gc.collect()
        return os.getpid() if sampled.start < 4 else len(ctypes.string_at(0))


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Of garbage in this process by itself."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_a_worker_leaves_the_trainers_garbage_alone_and_one_that_crashes_says_where(tmp_path: Path, capfd) -> None:
    Remains(tmp_path / "ended")
    batches = WorkerStream(Collecting(), [range(start, start + 1) for start in range(8)], 1, False)
    assert next(batches) != os.getpid()
    assert not (tmp_path / "ended").exists()
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*(Segmentation fault|exited unexpectedly)"):
        list(batches)
    assert "in __getitems__" in capfd.readouterr().err
    gc.collect()
    assert (tmp_path / "ended").read_text() == str(os.getpid())


def test_an_exception_of_the_trainer_ends_the_workers(clean: ShardSet) -> None:
    def train() -> None:
        with stream(clean, workers=2) as batches:
            next(batches)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert multiprocessing.active_children() == []


def run_script(clean: ShardSet, how: str) -> subprocess.Popen[str]:
    pattern = clean.names[0].replace("00000", "{00000..00002}")
    # tests that run in the background inherit SIG_IGN
    interruptible = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return python(PROGRAMS / "loader_workers.py", pattern, how, **interruptible)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("how", ["signals", "ctrl_c"])
def test_no_worker_outlives_the_run(clean: ShardSet, how: str) -> None:
    """signals: Slurm signals every process of a step, and the script ends without close. ctrl_c: so does the terminal."""
    process = run_script(clean, how)
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    if how == "ctrl_c":
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # or it would spin beside the tests that follow
        raise
    assert len(workers) == 2, err
    assert all(gone(pid) for pid in workers)
    if how == "ctrl_c":
        assert process.returncode != 0
        assert err.count("KeyboardInterrupt") == 1
    else:
        assert process.returncode == 0
        assert err == ""
        assert "alive" in out
