"""Whose an error is, wherever it comes through, and what is said about the machine's troubles."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.data.stream import WorkerStream
from megakd.recipe import load as recipes
from megakd.runtime import collectives, failures
from megakd.runtime.launch import World

OURS = "recipe nowhere.toml: no such file"


def _ours() -> None:
    recipes.load("nowhere.toml")


def _librarys() -> None:
    json.loads("{")


def _caught(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (of any kind; the caller looks at it)
        call()
    return caught.value


class Failing:
    """A dataset whose every item raises."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __getitems__(self, sampled: Any) -> Any:
        self.call()


def _in_a_worker(call: Callable[[], None]) -> None:
    stream: WorkerStream[Any] = WorkerStream(Failing(call), [range(2)], workers=1, pin_memory=False)
    try:
        next(stream)
    finally:
        stream.close()


def _in_a_thread(call: Callable[[], None]) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def _in_a_generator(call: Callable[[], None]) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        call()

    list(numbers())


def _wrapped_by_a_library(call: Callable[[], None]) -> None:
    try:
        call()
    except ValueError as error:
        raise RuntimeError("the library's own words") from error


def _of_the_main_rank(call: Callable[[], None]) -> None:
    collectives.by_main(call, World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("through", [_in_a_worker, _in_a_thread, _in_a_generator, _wrapped_by_a_library, _of_the_main_rank])
def test_an_error_of_ours_is_told_as_one_whatever_it_passes_and_a_librarys_is_not(through: Callable[[Callable[[], None]], None]) -> None:
    told = failures.explain(_caught(lambda: through(_ours)))
    assert told is not None
    assert told.startswith(OURS)
    assert failures.explain(_caught(lambda: through(_librarys))) is None


@pytest.mark.parametrize(("call", "ours"), [(_ours, True), (_librarys, False)])
def test_whose_an_error_is_survives_the_way_to_another_rank(call: Callable[[], None], ours: bool) -> None:
    sent = pickle.loads(pickle.dumps(failures.told(_caught(call))))  # noqa: S301  (its own)
    assert failures.is_ours(sent) is ours


def test_an_error_that_cannot_be_made_again_elsewhere_goes_as_its_text() -> None:
    error = failures.told(_caught(_librarys))  # JSONDecodeError asks for three arguments
    assert (type(error), "Expecting property name" in str(error)) == (ValueError, True)


def _os_error(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (_os_error(errno.ENOSPC, "/data/run"), ["No space left", "/data/run", "another --out"]),
        (_os_error(errno.ENOSPC, "/dev/shm/torch_1"), ["--shm-size", "data.workers"]),
        (_os_error(errno.ENAMETOOLONG, "x"), ["File name too long"]),
        (_os_error(errno.EMFILE), ["ulimit -n", "data.workers"]),
        (_os_error(errno.ENOMEM), ["memory", "--mem"]),
        (_os_error(errno.EAGAIN), ["ulimit -u"]),
        (_os_error(errno.ECONNREFUSED), ["network"]),
        (_os_error(errno.ENOENT, "/data/00001.tar"), ["/data/00001.tar", "put it back"]),
        (_os_error(errno.ESTALE, "/data"), ["file server"]),
        (MemoryError(), ["out of memory", "train_micro_batch_size_per_gpu"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), ["2.00 GiB", "megakd plan"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), ["train_micro_batch_size_per_gpu"]),
        (RuntimeError("CUDA error: out of memory"), ["activation_checkpointing"]),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), ["lower"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), ["--shm-size"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), ["ended from outside", "--mem"]),
        (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), ["--shm-size"]),
        (RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1"), ["another rank has ended"]),
        (RuntimeError(f"ImportError: /scratch/me/6v/c{'6vq7' * 13}.main.so: file too short"), ["TORCHINDUCTOR_CACHE_DIR"]),
        (RuntimeError("Error building extension 'cpu_adam'"), ["compiler"]),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), ["wandb", "pip install wandb"]),
        (ImportError("libcudart.so.11: cannot open shared object file", name="bitsandbytes.cextension"), ["bitsandbytes", "libcudart"]),
    ],
)
def test_a_trouble_of_the_machine_is_one_message_with_its_remedy(error: BaseException, words: list[str]) -> None:
    told = failures.explain(error)
    assert told is not None
    assert all(word in told for word in words), told


@pytest.mark.parametrize(
    "error",
    [KeyError("step"), RuntimeError("shape"), ValueError("a library's"), ModuleNotFoundError("no", name="megakd.gone"), TypeError("x")],
)
def test_a_bug_keeps_its_traceback(error: BaseException) -> None:
    assert failures.explain(error) is None


def test_a_file_that_is_gone_in_a_worker_is_named(tmp_path: Path) -> None:
    told = failures.explain(_caught(lambda: _in_a_worker(lambda: (tmp_path / "gone.tar").open())))  # type: ignore[arg-type, return-value]
    assert told is not None
    assert str(tmp_path / "gone.tar") in told
