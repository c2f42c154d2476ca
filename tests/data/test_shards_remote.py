"""Remote shards, through fsspec's memory filesystem and one that fails as networks do."""

import itertools
import multiprocessing
import threading
from collections import Counter
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megakd.data import storage, tar_index
from megakd.data.bad_samples import BadSample
from megakd.data.shards import ShardSet, expand
from support.shards import open_shards, pair, write_tar

NAMES = (f"set{number}" for number in itertools.count())


class Flaky(MemoryFileSystem):
    """Memory, but the requests that `fail` picks by their number break, and with `first_fails` every place's first, third, ..."""

    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    requests = 0
    broken = 0
    slowness = 0.0
    fail = staticmethod(lambda request: False)
    first_fails = False
    at: ClassVar[Counter[tuple]] = Counter()  # by place: with parallel readers a request's number belongs to nobody

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _maybe(self, *place: object) -> None:
        Flaky.requests += 1
        Flaky.at[place] += 1
        if Flaky.fail(Flaky.requests) or (Flaky.first_fails and Flaky.at[place] % 2):
            Flaky.broken += 1
            raise ConnectionResetError("the network went away")

    def cat_file(self, path, start=None, end=None, **more):
        self._maybe(path, start, end)
        return super().cat_file(path, start=start, end=end, **more)

    def _open(self, path, mode="rb", **more):
        if mode == "rb":
            self._maybe(path)
            threading.Event().wait(Flaky.slowness)
        return super()._open(path, mode, **more)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    Flaky.requests = Flaky.broken = 0
    Flaky.fail, Flaky.first_fails = staticmethod(lambda request: False), False
    Flaky.at.clear()
    yield slept
    Flaky.fail, Flaky.first_fails = staticmethod(lambda request: False), False


def upload(tmp_path: Path, protocol: str, samples: int) -> str:
    """Two shards under a name of their own; returns the pattern."""
    name = next(NAMES)
    fs = fsspec.filesystem(protocol)
    for shard in range(2):
        numbers = range(shard, samples, 2)
        local = write_tar(tmp_path / "upload" / f"{shard}.tar", [member for number in numbers for member in pair(str(number), number)])
        with fs.open(f"/{name}/{shard}.tar", "wb") as file:
            file.write(local.read_bytes())
    return f"{protocol}://{name}/{{0..1}}.tar"


def captions(shards: ShardSet) -> list[str]:
    return [sample.members["caption"].decode() for sample in shards.read_each(list(range(len(shards))), ("image", "caption"))]


EXPECTED = [f"caption {number}" for number in (0, 2, 4, 1, 3, 5)]


@pytest.mark.parametrize("cached", [False, True])
def test_remote_shards_read_as_local_ones(tmp_path: Path, cached: bool) -> None:
    pattern = upload(tmp_path, "memory", 6)
    assert len(expand(pattern)) == 2
    more = {"cache": str(tmp_path / "cache")} if cached else {}
    assert captions(open_shards(pattern, **more)) == EXPECTED
    assert len(list((tmp_path / "cache/shards").glob("*.tar"))) == (2 if cached else 0)


def test_broken_requests_are_tried_again_with_growing_pauses(tmp_path: Path, calm: list[float]) -> None:
    pattern = upload(tmp_path, "flaky", 6)
    shards = open_shards(pattern)
    Flaky.requests, Flaky.fail = 0, staticmethod(lambda request: request <= 3)
    calm.clear()
    assert shards.read(0, ("caption",)).members["caption"] == b"caption 0"
    assert Flaky.requests == 4
    assert len(calm) == 3
    assert all(0.5 * 0.1 * 2**turn <= pause <= 0.1 * 2**turn for turn, pause in enumerate(calm))


def test_a_dead_network_is_a_read_error_after_bounded_attempts(tmp_path: Path, calm: list[float]) -> None:
    shards = open_shards(upload(tmp_path, "flaky", 6))
    Flaky.requests, Flaky.fail = 0, staticmethod(lambda request: True)
    with pytest.raises(BadSample, match="failed 5 times, last with ConnectionResetError: the network went away") as caught:
        shards.read(0, ("image",))
    assert caught.value.reason == "read_error"
    assert Flaky.requests == 5


def test_indexing_and_copying_survive_a_flaky_network(tmp_path: Path) -> None:
    pattern = upload(tmp_path, "flaky", 6)
    Flaky.first_fails = True
    assert captions(open_shards(pattern)) == EXPECTED
    assert captions(open_shards(pattern, cache=str(tmp_path / "cache"))) == EXPECTED
    assert Flaky.broken > 3
    assert not list((tmp_path / "cache").rglob(".*"))


def test_the_threads_that_read_open_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11's `ast`, with which np.load parses headers, fails at random when several threads use it at once."""
    shards = open_shards(upload(tmp_path, "memory", 6))
    threads: set[threading.Thread] = set()
    load = tar_index.load
    monkeypatch.setattr(tar_index, "load", lambda *args: (threads.add(threading.current_thread()), load(*args))[1])
    assert captions(shards) == EXPECTED
    assert threads == {threading.current_thread()}


def test_a_shard_is_copied_once_and_again_when_it_changes(tmp_path: Path) -> None:
    pattern, cache = upload(tmp_path, "flaky", 6), str(tmp_path / "cache")
    captions(open_shards(pattern, cache=cache))
    copied = Flaky.requests
    assert copied == 2
    captions(open_shards(pattern, cache=cache))
    assert Flaky.requests == copied
    fs = fsspec.filesystem("flaky")
    (first, _) = expand(pattern)
    with fs.open(first, "wb") as file:
        file.write(write_tar(tmp_path / "new.tar", pair("n", 9)).read_bytes())
    assert captions(open_shards(pattern, cache=cache)) == ["caption 9", "caption 1", "caption 3", "caption 5"]


def _copy(pattern: str, cache: str, queue) -> None:
    queue.put((captions(open_shards(pattern, cache=cache)), Flaky.requests))


def test_processes_that_want_the_same_shard_copy_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flaky, "slowness", 0.3)  # long enough for all of them to want it
    pattern, cache = upload(tmp_path, "flaky", 6), str(tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_copy, args=(pattern, cache, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    assert [texts for texts, _ in results] == [EXPECTED] * 3
    assert sum(requests for _, requests in results) == 2
