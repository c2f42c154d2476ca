"""A torch DataLoader's iterator that closes: whatever ends the loop, no worker outlives it."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import os
import signal
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch.utils.data import DataLoader

from megakd.data.bad_samples import BadCounter, BadLog
from megakd.runtime import failures

T = TypeVar("T")


class HasBad(Protocol):
    """A batch that knows what was bad in it."""

    @property
    def bad(self) -> BadCounter: ...


Counted = TypeVar("Counted", bound=HasBad)


class WorkerStream(Iterator[T], Generic[T]):
    """`dataset.__getitems__(sampled)` for each thing `sampler` yields, in order, made by `workers` processes (0: in this one).

    An error of a worker is raised here, the error itself where megakd or the system raised it, after the workers have ended; so is Ctrl-C.
    """

    def __init__(self, dataset: Any, sampler: Iterable[Any], workers: int, pin_memory: bool) -> None:
        if workers:
            # rust tokenizers warn and may deadlock when forked with their threads on; it must be set before the fork
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loader: DataLoader[Any] = DataLoader(
            cast(Any, _Carried(dataset) if workers else dataset),
            batch_sampler=sampler,  # of ranges, which are sequences as lists are
            collate_fn=_as_it_is,
            num_workers=workers,
            # also in a process that was started otherwise, as a study's runs are: by that way a worker loads the libraries anew
            multiprocessing_context="fork" if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin_memory and torch.cuda.is_available(),  # without a GPU torch warns at every start
            worker_init_fn=_quiet_worker,
        )
        self._iterator: Any = iter(loader)
        self._at_exit = functools.partial(_close, weakref.ref(self))
        # before torch's and multiprocessing's own hooks, which wait for workers that were never told to stop
        atexit.register(self._at_exit)

    def __next__(self) -> T:
        if self._iterator is None:
            raise StopIteration
        try:
            item: T | _Raised = next(self._iterator)
            if isinstance(item, _Raised):
                raise item.error
        except BaseException:
            self.close()
            raise
        return item

    def close(self) -> None:
        """Ends the workers and waits for them. May be called more than once."""
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            return
        atexit.unregister(self._at_exit)
        workers = getattr(iterator, "_workers", [])
        if workers:
            # torch has no public way to end an iterator early: its own is __del__, which a traceback or a cycle puts off
            iterator._shutdown_workers()
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the interpreter's end the modules may be gone
            self.close()


@dataclass(frozen=True)
class _Raised:
    """In the place of a batch: why there is none."""

    error: Exception


class _Carried:
    """A dataset whose errors for users arrive in the main process as they were raised.

    torch raises another one of the same class there, with the worker's traceback as its message, and no frame of megakd's in it.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, sampled: Any) -> Any:
        try:
            return self._dataset.__getitems__(sampled)
        except (ValueError, OSError, MemoryError, ImportError) as error:
            if failures.explain(error) is None:
                raise
            return _Raised(failures.told(error))


def reported(stream: WorkerStream[Counted]) -> Iterator[Counted]:
    """The batches of a set that is read once, what was bad in each logged; the workers end with it."""
    log = BadLog()
    try:
        for batch in stream:
            log.report(batch.bad)
            yield batch
    finally:
        log.close()
        stream.close()


def _close(reference: weakref.ref[WorkerStream[Any]]) -> None:
    if (stream := reference()) is not None:
        stream.close()


def _as_it_is(item: T) -> T:
    return item


def _quiet_worker(worker: int) -> None:
    """Signals are the main process's to answer: Slurm and a terminal send them to every process of the job.

    A worker that died of one would fail the run while the trainer is writing its last checkpoint. `close` ends workers, and
    torch's watchdog does when the main process is killed. One that dies of its own fault, in a decoder for instance, says in which line.
    """
    # What the fork brought along stays as it is: a worker has no use for the ends of the trainer's models, process groups and open files,
    # some of which join threads that it does not have; and what is never looked at is never copied.
    gc.freeze()
    faulthandler.disable()  # where the trainer has it on, torch's handler has come before it, and names the signal alone
    faulthandler.enable(2)  # where the process was started; sys.stderr may be something else
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    if worker == 0:
        warnings.simplefilter("always")
        warnings.showwarning = _once_a_place(warnings.showwarning)
    else:
        warnings.simplefilter("ignore")  # what the first one says of odd files stands for all


def _once_a_place(show: Callable[..., None]) -> Callable[..., None]:
    """Warnings of one line of a library are one kind, whatever numbers and names of files their texts have: each is said once."""
    shown_places: set[tuple[str, int]] = set()

    def shown(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
        if (filename, lineno) not in shown_places:
            shown_places.add((filename, lineno))
            show(message, category, filename, lineno, *more)

    return shown
