"""How ranks find each other, and end together: the error of one is the error of all.

`meet` joins the ranks at MASTER_ADDR:MASTER_PORT and says who is missing. `Peers.tell` lets the others know why this rank ends; each polls
for it in a thread, as a rank that waits in a collective of the GPU never hears that another one has gone.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megakd.runtime.exits import EXIT_USER_ERROR

CONNECT_SECONDS = 10.0  # one attempt to reach the meeting point
NOTICE_SECONDS = 10.0  # until a line says what is waited for
# Until waiting ends: nodes of one job start minutes apart, ranks in a shell of `srun --pty` never do.
MEETING_SECONDS, MEETING_SECONDS_AT_A_TERMINAL = 600.0, 30.0
POLL_SECONDS = 0.5  # between two looks for a failure of another rank
ABORT_SECONDS = 5.0  # the main thread's, to hear of that failure by itself
DRAIN_SECONDS = 10.0  # that rank 0 keeps the store for the others to read its failure
CLOSE_SECONDS = 30.0  # that a failed rank has to close what it opened
FAILED, REFUSED, GONE = "failed", "refused", "gone"


@dataclass(frozen=True)
class Meeting:
    """Where `size` ranks meet. agent: torchrun keeps the store in its own process; attempt: how often it has started the ranks."""

    rank: int
    size: int
    host: str
    port: int
    agent: bool = False
    attempt: str = "0"
    timeout: float = MEETING_SECONDS

    def __str__(self) -> str:
        return f"{self.host}:{self.port} (MASTER_ADDR, MASTER_PORT)"


@dataclass(frozen=True)
class Failure:
    """Why a rank ended: a text for people, and its exit code."""

    rank: int
    text: str
    code: int


def meet(place: Meeting) -> tuple[dist.Store, dist.TCPStore]:
    """The ranks' common store, and its connection, when every rank is there.

    Raises ValueError with the remedy for an unknown host, a port in use, two processes of one rank, and ranks that do not come.
    """
    end = time.monotonic() + place.timeout
    _resolve(place)
    serves = place.rank == 0 and not place.agent
    connection = _serve(place) if serves else _reach(place, end)
    # torch's name for torchrun's attempts, so that a restarted rank does not meet itself of the attempt before
    store = dist.PrefixStore(f"/worker/attempt_{place.attempt}", connection)
    try:
        _register(place, store)
    except ValueError as error:
        # the ranks that are there wait for this one; FAILED is for a run that has begun, which may be another job's
        _tell(store, Failure(place.rank, str(error), EXIT_USER_ERROR), REFUSED)
        raise
    _await(place, store, end)
    return store, connection


def _resolve(place: Meeting) -> None:
    for attempt in range(3):
        try:
            socket.getaddrinfo(place.host, place.port, proto=socket.IPPROTO_TCP)
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN and attempt < 2:
                time.sleep(1)
                continue
            raise ValueError(
                f"MASTER_ADDR = {place.host!r}: no machine of that name is known here ({error.strerror}); give the name or the address of "
                f"the machine of rank 0, or unset it"
            ) from None
        except (UnicodeError, ValueError) as error:
            raise ValueError(f"MASTER_ADDR = {place.host!r}: not a name of a machine ({error})") from None
        return


def _serve(place: Meeting) -> dist.TCPStore:
    try:
        return _store(place, serves=True)
    except dist.DistError as error:
        text = str(error)
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise ValueError(
                f"MASTER_PORT = {place.port}: another program on this machine has this port (a run that has not ended, a second rank 0?); "
                f"end it, or set MASTER_PORT to a free one (torchrun and deepspeed: --master_port)"
            ) from None
        if "EACCES" in text or "permission denied" in text.lower():
            raise ValueError(f"MASTER_PORT = {place.port}: the system does not give this port; set it to one from 1024 on") from None
        raise ValueError(
            f"rank 0 does not reach itself at {place}: MASTER_ADDR must be the machine of rank 0 ({socket.gethostname()}), and no firewall "
            f"between the machines may close the port"
        ) from None


def _reach(place: Meeting, end: float) -> dist.TCPStore:
    next_notice = time.monotonic() + NOTICE_SECONDS
    while True:
        connection = _attempt(place)
        if isinstance(connection, dist.TCPStore):
            return connection
        if connection is None or _answers(place):
            retried = None if connection is None else _attempt(place)  # rank 0 may have begun to answer just now
            if isinstance(retried, dist.TCPStore):
                return retried
            raise ValueError(
                f"something answers at {place} that is not rank 0 of this run: another program has the port; end it, or set MASTER_PORT "
                f"to a free one on all ranks (torchrun and deepspeed: --master_port)"
            )
        if time.monotonic() > end:
            raise ValueError(
                f"rank {place.rank} of {place.size}: nobody answers at {place} for {place.timeout:.0f} s; rank 0 has not started or has "
                f"ended (see its log), MASTER_ADDR names another machine, or a firewall closes the port"
            ) from connection
        if time.monotonic() > next_notice:
            print(f"[rank {place.rank}] waiting for rank 0 at {place}", file=sys.stderr, flush=True)
            next_notice = time.monotonic() + 60


def _attempt(place: Meeting) -> dist.TCPStore | Exception | None:
    """The connection, why there is none, or None where something takes the connection and is silent: torch would wait for ever."""
    done: list[dist.TCPStore | Exception] = []

    def connect() -> None:
        try:
            done.append(_store(place, serves=False))
        except dist.DistError as error:
            done.append(error)

    thread = threading.Thread(target=connect, name="meeting", daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 5)
    return done[0] if done else None


def _store(place: Meeting, *, serves: bool) -> dist.TCPStore:
    # not longer than an attempt, as torch retries by itself
    limit = timedelta(seconds=min(CONNECT_SECONDS, place.timeout))
    return dist.TCPStore(place.host, place.port, place.size, serves, timeout=limit, wait_for_workers=False, multi_tenant=serves)


def _answers(place: Meeting) -> bool:
    try:
        socket.create_connection((place.host, place.port), timeout=3).close()
    except OSError:
        return False
    return True


def _register(place: Meeting, store: dist.Store) -> None:
    me = f"{socket.gethostname()}, process {os.getpid()}"
    if place.rank == 0:
        store.set("size", str(place.size))
    else:
        try:
            store.wait(["size"], timedelta(seconds=2 * CONNECT_SECONDS))
        except dist.DistError:
            raise ValueError(
                f"the ranks of another job meet at {place}: set MASTER_PORT to a port of this job's own, the same on all ranks"
            ) from None
    size = store.get("size").decode()
    if size != str(place.size):
        raise ValueError(
            f"WORLD_SIZE = {place.size} on rank {place.rank}, and {size} on rank 0: another job meets at {place}, or the ranks were "
            f"started with different numbers"
        )
    there = store.compare_set(f"rank/{place.rank}", "", me).decode()
    if there != me:
        raise ValueError(f"RANK = {place.rank} twice: {there} is it already, and {me} would be too; give each process its own")
    store.add("joined", 1)


def _await(place: Meeting, store: dist.Store, end: float) -> None:
    next_notice = time.monotonic() + NOTICE_SECONDS
    pause = 0.02
    while (joined := store.add("joined", 0)) < place.size:
        if (failure := _heard(store, place.rank, REFUSED)) is not None:
            raise ValueError(of_another(failure))
        if time.monotonic() > min(end, next_notice):
            absent = [rank for rank in range(min(place.size, 256)) if not store.check([f"rank/{rank}"])]
            missing = f"{place.size - joined} of {place.size} ranks are missing at {place}: {', '.join(map(str, absent[:8]))}" + (
                ", ..." if len(absent) > 8 else ""
            )
            if time.monotonic() > end:
                raise ValueError(
                    f"{missing}; waited {place.timeout:.0f} s. Start as many processes as WORLD_SIZE says (under SLURM: srun python "
                    f"megakd/train.py ..., with --pty one task alone); for one process in such a shell: WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 "
                    f"MASTER_ADDR=localhost MASTER_PORT=0 python megakd/train.py ..."
                )
            if place.rank == 0:
                print(f"waiting: {missing}", file=sys.stderr, flush=True)
            next_notice = time.monotonic() + 60
        time.sleep(pause)
        pause = min(0.5, pause * 1.5)


class Peers:
    """The other ranks of this run. After `tell` on one, each of the others ends within ABORT_SECONDS with the same text."""

    def __init__(self, rank: int, size: int, store: dist.Store, connection: dist.TCPStore, attempt: str = "0") -> None:
        self._rank, self._size, self._store = rank, size, store
        # the thread's own connection, as the main thread may wait in the other one
        self._own = dist.PrefixStore(f"/worker/attempt_{attempt}", connection.clone())
        self._closed, self._ending = threading.Event(), threading.Event()
        self._mine: Failure | None = None
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def tell(self, text: str, code: int) -> None:
        """Let the others know that this rank ends; they hear the first to tell."""
        self._mine = Failure(self._rank, text, code)
        self._ending.set()
        try:
            _tell(self._store, self._mine)
            self._store.add(GONE, 1)
        except dist.DistError:  # rank 0 has gone, and the store with it
            return

    def heard(self, seconds: float = 0.0) -> Failure | None:
        """Why another rank ends, if it tells within so many seconds."""
        end = time.monotonic() + seconds
        while True:
            failure = _heard(self._store, self._rank)
            if failure is not None or time.monotonic() >= end:
                return failure
            time.sleep(0.1)

    def close(self) -> None:
        """Stop polling. Rank 0, which keeps the store, stays until the others have heard."""
        failed = self._ending.is_set()
        self._closed.set()
        if failed and self._rank == 0:
            end = time.monotonic() + DRAIN_SECONDS
            try:
                while self._store.add(GONE, 0) < self._size and time.monotonic() < end:
                    time.sleep(0.05)
            except dist.DistError:
                pass
        self._thread.join(timeout=2 * POLL_SECONDS)

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            if self._ending.is_set():
                if not self._closed.wait(CLOSE_SECONDS) and self._mine is not None:
                    os._exit(self._mine.code)  # what was to be closed waits for a device or a peer
                return
            failure = _heard(self._own, self._rank)
            if failure is None:
                continue
            # the main thread hears it where its collective fails, but may also wait for ever
            if self._closed.wait(ABORT_SECONDS) or self._ending.is_set():
                continue
            print(f"[rank {self._rank}] {of_another(failure)}", file=sys.stderr, flush=True)
            try:
                self._own.add(GONE, 1)
            finally:
                os._exit(failure.code)


def _tell(store: dist.Store, failure: Failure, key: str = FAILED) -> None:
    store.compare_set(key, "", json.dumps({"rank": failure.rank, "text": failure.text[:20_000], "code": failure.code}))


def _heard(store: dist.Store, rank: int, key: str = FAILED) -> Failure | None:
    """What another rank has told; None also where the store has gone with rank 0."""
    try:
        if not store.check([key]):
            return None
        content = json.loads(store.get(key))
    except RuntimeError:
        return None
    return None if content["rank"] == rank else Failure(content["rank"], content["text"], content["code"])


def of_another(failure: Failure) -> str:
    """Another rank's failure in this one's words."""
    return f"{failure.text}\n(found by rank {failure.rank}; all ranks end with it)"
