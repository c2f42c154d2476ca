"""Two ranks, one of which finds something wrong: both end within seconds, with the same message and exit code, and no traceback."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from megakd.runtime import peers
from megakd.runtime.launch import port
from support.forked import Forked, fork
from support.runs import TRAIN, Finished, environment, rows


def _start(folders: tuple[Path, Path], *arguments: str | Path, meeting: int | None = None, **own: str) -> list[Forked]:
    """Two ranks without a launcher, each in a folder of its own. own: variables of rank 1 alone."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(meeting or port(time.time_ns() // 1000))}
    command = [str(TRAIN), *map(str, arguments)]
    variables = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared, **(own if rank else {})} for rank in (0, 1)]
    return [fork(command, environment(**variables[rank]), folders[rank]) for rank in (0, 1)]


def _ends(ranks: list[Forked], seconds: float = 120) -> list[Finished]:
    try:
        printed = [process.communicate(timeout=seconds)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [Finished(process.returncode, out, "") for process, out in zip(ranks, printed, strict=True)]


@pytest.mark.parametrize("knows", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_file_that_one_rank_alone_does_not_see_ends_both(knows: int, recipe_file: Path, tmp_path: Path) -> None:
    folders = (tmp_path / "0", tmp_path / "1")
    for folder in folders:
        folder.mkdir()
    (folders[knows] / "own.toml").write_text(recipe_file.read_text())
    ended = _ends(_start(folders, "--recipe", "own.toml", "--out", tmp_path / "run", "--dry_run"))
    for rank in ended:
        assert rank.code == 2, rank.out
        assert rank.out.count("error: recipe own.toml: no such file") == 1, rank.out
        assert "Traceback" not in rank.out
    assert f"(found by rank {1 - knows}; all ranks end with it)" in ended[knows].out


@pytest.mark.slow
def test_a_rank_that_is_killed_in_training_takes_the_other_along_without_a_traceback(recipe_file: Path, tmp_path: Path) -> None:
    ranks = _start(
        (tmp_path, tmp_path),
        "--recipe",
        recipe_file,
        "--out",
        tmp_path / "run",
        "--set",
        "optim.steps=100000",
        "--set",
        "checkpoint.every=90000",
    )
    end = time.monotonic() + 90
    while len(rows(tmp_path / "run")) < 3:
        assert time.monotonic() < end, "it hangs: this says nothing of how fast it is"
        assert all(process.poll() is None for process in ranks), _ends(ranks)
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGKILL)
    left, _ = _ends(ranks, 60)
    assert left.code == 1, left.out
    assert "another rank has ended" in left.out
    assert "Traceback" not in left.out


def test_ranks_that_disagree_about_their_number_both_say_so(recipe_file: Path, tmp_path: Path) -> None:
    for rank in _ends(_start((tmp_path, tmp_path), "--recipe", recipe_file, "--out", tmp_path / "run", WORLD_SIZE="3")):
        assert rank.code == 2, rank.out
        assert "WORLD_SIZE = 3 on rank 1, and 2 on rank 0" in rank.out
        assert "Traceback" not in rank.out


@pytest.mark.slow
def test_a_port_that_another_program_has_is_named_with_the_remedy_on_every_rank(recipe_file: Path, tmp_path: Path) -> None:
    """The program takes connections and says nothing, for which torch would wait without an end."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        for rank in _ends(_start((tmp_path, tmp_path), "--recipe", recipe_file, "--out", tmp_path / "run", meeting=taken)):
            assert rank.code == 2, rank.out
            assert "MASTER_PORT" in rank.out
            assert str(taken) in rank.out
            assert "another program" in rank.out
            assert "Traceback" not in rank.out


def test_ranks_that_do_not_come_are_named_and_not_waited_for_without_an_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "NOTICE_SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"2 of 3 ranks are missing at localhost:\d+ .*: 1, 2; waited 1 s"):
        peers.meet(peers.Meeting(0, 3, "localhost", port(time.time_ns() // 1000), timeout=1.0))
    assert "waiting: 2 of 3 ranks are missing" in capfd.readouterr().err


def test_a_rank_whose_first_one_does_not_come_says_what_may_be_wrong() -> None:
    with pytest.raises(ValueError, match=r"rank 1 of 2: nobody answers at localhost:\d+ .* firewall"):
        peers.meet(peers.Meeting(1, 2, "localhost", port(time.time_ns() // 1000), timeout=1.0))


@pytest.mark.parametrize(("host", "words"), [("no-such-host.invalid", "no machine of that name"), ("a" * 300, "not a name of a machine")])
def test_a_host_that_nobody_knows_is_named(host: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"MASTER_ADDR = .*{words}"):
        peers.meet(peers.Meeting(1, 2, host, 12345, timeout=1.0))
