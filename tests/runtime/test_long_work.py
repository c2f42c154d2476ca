"""Work that takes long says how far it is, by a bar with the time left on a terminal and by lines elsewhere; what is short says nothing."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from megakd.runtime import console
from megakd.runtime.console import LongWork, RunConsole, with_progress
from support import python_path

ROW = "{'step': %d, 'loss': 0.5, 'losses': {'contrastive': 0.5}, 'images_per_second': 100.0, 'lr': 1e-3}"


def environment() -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name != "RANK"}, "PYTHONPATH": python_path()}


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def work(clock: Clock, what: str, seconds: int, total: int, unit: str = "shards") -> None:
    """A piece of work of so many seconds."""
    with LongWork(what, total, unit, clock) as long:
        for _ in range(seconds):
            clock.now += 1
            long.advance(total / seconds)


def test_on_a_pipe_there_is_a_line_at_most_every_half_minute_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    work(Clock(), "indexing", 100, 1000)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "indexing: 50 of 1,000 shards, about 2 min left",
        "indexing: 350 of 1,000 shards, about 65 s left",
        "indexing: 650 of 1,000 shards, about 35 s left",
        "indexing: 950 of 1,000 shards, about 5 s left",
    ]


def test_what_takes_less_than_five_seconds_is_not_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    work(Clock(), "looking", 4, 1000)
    assert capsys.readouterr().err == ""


def test_units_of_many_seconds_are_mentioned_before_the_first_of_them_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.02)
    with LongWork("exporting", 3, "files", coarse=True):
        deadline = time.monotonic() + 60
        while not (said := capsys.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert said == "exporting: 0 of 3 files\n"
    monkeypatch.setattr(console, "QUIET_SECONDS", 60.0)
    with LongWork("exporting", 3, "files", coarse=True):
        pass  # the timer ends with it
    assert capsys.readouterr().err == ""


def test_short_works_of_one_kind_are_one_long_one_and_others_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    for number in range(12):
        work(clock, f"hashing file {number}", 4, 4_000_000_000, "bytes")
    assert capsys.readouterr().err.splitlines() == [
        "hashing file 1: 1.0 of 4.0 GB, about 3 s left",
        "hashing file 8: 3.0 of 4.0 GB, about 1 s left",
    ]
    for name in ("reading", "writing", "sorting"):
        work(clock, name, 4, 8)
    assert capsys.readouterr().err == ""


def test_other_ranks_and_works_of_nothing_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    work(Clock(), "empty", 50, 0)
    monkeypatch.setenv("RANK", "1")
    work(Clock(), "indexing", 100, 1000)
    assert capsys.readouterr().err == ""


def test_items_pass_through_and_those_without_a_length_need_a_total() -> None:
    assert list(with_progress([3, 1, 2], "counting", "numbers")) == [3, 1, 2]
    assert list(with_progress(iter("ab"), "spelling", "letters", total=2)) == ["a", "b"]


def test_a_closed_standard_error_does_not_end_the_work() -> None:
    code = (
        "import os, time; from megakd.runtime import console; os.close(2); now = iter(range(0, 1000, 10));\n"
        "with console.LongWork('indexing', 9, 'shards', lambda: next(now)) as work:\n    [work.advance() for _ in range(9)]\n"
        "print('done')"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert finished.stdout == "done\n"
    assert finished.returncode == 0


def on_terminal(code: str, *, out: int | None = None, columns: int = 100) -> tuple[str, str]:
    """What a program writes on a terminal, with control sequences. out: where standard output goes instead, the second that is returned."""
    master, slave = pty.openpty()
    read, write = os.pipe()
    variables = {**environment(), "TERM": "xterm-256color", "COLUMNS": str(columns)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=slave, stdout=write if out else slave, stderr=slave, env=variables, close_fds=True
    )
    os.close(slave)
    os.close(write)
    texts = {master: b"", read: b""}
    open_ends = {master, read}
    while open_ends:
        for source in select.select(list(open_ends), [], [])[0]:
            try:
                more = os.read(source, 65536)
            except OSError:  # how a pseudo-terminal ends
                more = b""
            texts[source] += more
            if not more:
                open_ends.remove(source)
                os.close(source)
    assert process.wait() == 0, texts
    return texts[master].decode(), texts[read].decode()


def drawn(text: str) -> Iterator[str]:
    """The lines without control sequences."""
    for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)):
        if line.strip():
            yield line.rstrip()


WORKING = """
import sys, time
from megakd.runtime.console import LongWork
with LongWork("short", 10, "shards") as work:
    for _ in range(10):
        time.sleep(0.02); work.advance()
print("the result")
began, done = time.monotonic(), 0
with LongWork("indexing", 70, "shards") as work:
    while done < 65:  # ten in a second, however slow this machine is
        time.sleep(0.05)
        new = int((time.monotonic() - began) * 10)
        work.advance(new - done)
        done = new
    print("a line in between"); sys.stderr.write("and a warning\\n")
"""


def test_on_a_terminal_there_is_a_bar_with_the_time_left_that_goes_when_the_work_is_done() -> None:
    text, _ = on_terminal(WORKING)
    lines = list(drawn(text))
    assert lines[0] == "the result"
    assert not any("short" in line for line in lines)
    bars = [line for line in lines if line.startswith("indexing ")]
    assert len(bars) > 2
    for bar in bars:  # none in the first five seconds
        assert re.search(r"indexing .*━.* (5\d|6\d|70) of 70 shards 0:00:0[0-3]", bar), bar
    assert "a line in between" in lines
    assert "and a warning" in lines
    assert text.rstrip().endswith(("\x1b[2K", "\x1b[?25h", "\x1b[1A\x1b[2K"))  # the bar's line is cleared


def test_what_is_printed_for_a_file_goes_to_the_file_while_a_bar_is_on_the_terminal() -> None:
    text, to_file = on_terminal(WORKING, out=1)
    assert to_file.splitlines() == ["the result", "a line in between"]
    assert "a line in between" not in text
    assert "indexing" in text


def test_a_dumb_terminal_gets_lines() -> None:
    text, _ = on_terminal("import os; os.environ['TERM'] = 'dumb'\n" + WORKING)
    assert [line for line in drawn(text) if "indexing" in line] != []
    assert "\x1b" not in text


def test_work_beside_a_runs_bar_is_drawn_with_it_and_leaves_it_alone() -> None:
    code = f"""
import time
from megakd.runtime.console import LongWork, RunConsole
run = RunConsole()
run.step({ROW % 1}, 2)
with LongWork("evaluating", 60, "images") as work:
    for number in range(60):
        time.sleep(0.1); work.advance()
run.step({ROW % 2}, 2)
run.close()
run.say("the end")
"""
    text, _ = on_terminal(code, columns=140)
    lines = list(drawn(text))
    assert any(re.search(r"evaluating .*of 60 images", line) for line in lines)
    last = [line for line in lines if line.startswith("training")][-1]
    assert "2 of 2 steps" in last
    assert "loss 0.5000" in last
    assert lines[-1] == "the end"
    assert lines[-2] == last  # it stays, and the evaluation's bar does not


def test_a_forked_process_does_not_draw_what_its_parent_does() -> None:
    code = f"""
import os, sys
from megakd.runtime.console import RunConsole
run = RunConsole()
run.step({ROW % 1}, 2)
pid = os.fork()
if pid == 0:
    print("the child", flush=True)
    os._exit(0 if type(sys.stdout).__name__ == "TextIOWrapper" else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert "the child" in on_terminal(code)[0]


def test_a_runs_steps_are_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run = RunConsole()
    row = {"step": 1, "loss": 0.5, "losses": {"contrastive": 0.5}, "images_per_second": 9.0, "lr": 1e-3, "gradient_norm": 1.0}
    run.step({**row, "memory_gb": 0.0, "seconds": {"data": 0.1}}, 2)
    run.close()
    assert capsys.readouterr().out.startswith("step 1/2 | loss 0.5000 (contrastive 0.5000) | 9 images/s")
