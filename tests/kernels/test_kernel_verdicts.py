"""What the kernel benchmarks say of recorded rows: which targets of an H200 and of a CPU are reached, and which backend is the fastest."""

from __future__ import annotations

import json
import sys

import pytest

from support.kernel_benchmarks import BENCHMARKS, GOOD, made, spoiled

sys.path.insert(0, str(BENCHMARKS))
import run
from records import append, together
from verdicts import CPU_PAIRS, dispatch, verdicts

sys.path.remove(str(BENCHMARKS))


def test_all_targets_hold_on_good_numbers():
    assert [verdict.holds for verdict in verdicts(GOOD, "cuda")] == [True] * 6
    shown = "H200: at least 2.0 x eager from N 8192 on: similarity N 8192 (512/1024) 2 x; similarity N 32768 (512/1024) 2 x"
    assert str(verdicts(GOOD)[0]) == f"reached       {shown}"


@pytest.mark.parametrize(
    ("rows", "failing"),
    [
        (spoiled("eager", 8192, median_ms="19.9"), 0),
        (spoiled("compiled", 1024, median_ms="9.9", p90_ms="9.95"), 1),
        (spoiled("auto", 32768, peak_mb="201"), 2),
        (spoiled("auto", 131072, peak_mb="3000"), 3),
        (spoiled("auto", 131072, median_ms="500"), 4),
        (spoiled("auto", 131072, percent_of_matrix="54.9"), 5),
    ],
)
def test_each_target_can_fail_alone(rows, failing):
    assert [verdict.holds for verdict in verdicts(rows, "cuda")] == [number != failing for number in range(6)]


def test_as_fast_as_compiled_allows_for_compileds_own_spread():
    assert verdicts(spoiled("compiled", 1024, median_ms="9.9", p90_ms="10.1"))[1].holds


def test_what_was_not_measured_neither_holds_nor_fails():
    small = [row for row in GOOD if row["pairs"] == "1024"]
    assert [verdict.holds for verdict in verdicts(small, "cuda")] == [None, True, None, None, None, None]


def test_only_rows_of_one_run_are_compared():
    """A later run of `auto` alone does not meet the eager of a run before it."""
    rows = [*GOOD, made("auto", 8192, ms="30", date="2030-01-02")]
    assert verdicts(rows)[0].holds
    found = together(rows, "both")
    assert found["similarity", 8192, 512, 1024]["auto"]["median_ms"] == "30"
    assert "eager" not in found["similarity", 8192, 512, 1024]


def test_check_says_which_target_fails_and_exits_with_1(tmp_path, capsys):
    path = tmp_path / "made.csv"
    append(path, spoiled("eager", 8192, median_ms="15"))
    assert run.main(["--check", "--csv", str(path)]) == 1
    said = capsys.readouterr().out
    assert "MISSED        H200: at least 2.0 x eager from N 8192 on: similarity N 8192 (512/1024) 1.5 x (!)" in said
    assert said.count("MISSED") == 1
    assert said.count("not measured  CPU: ") == len(CPU_PAIRS)


@pytest.mark.parametrize(("ms", "holds"), [("11", True), ("11.2", False)])
def test_on_a_cpu_auto_is_compared_with_the_fastest_backend_of_each_size(ms, holds):
    """Of rows of a CPU alone, and only where the one that forms the matrix was measured beside it."""
    here = {"device": "CPU Made", "dtype": "float32"}
    times = (("auto", ms), ("compiled", "10"), ("chunked", "12"), ("open_clip", "1"))
    rows = [*GOOD, *(made(name, 8192, ms=each) | here for name, each in times), made("auto", 4096, ms="1") | here]
    found = {verdict.target: verdict.holds for verdict in verdicts(rows, "cpu")}
    wanted = {"4096": None, "8192": holds}
    assert {pairs: found[f"CPU: auto at least at 0.9 of the fastest backend at N {pairs}"] for pairs in wanted} == wanted
    assert [verdict.holds for verdict in verdicts(rows, "cuda")] == [True] * 6


def test_a_check_reads_the_files_of_all_devices(tmp_path, capsys):
    append(tmp_path / "gpu.csv", GOOD)
    append(tmp_path / "cpu.csv", [made(name, 8192, ms="10") | {"device": "CPU Made"} for name in ("auto", "compiled")])
    assert run.main(["--check", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("reached       H200: ") == 6
    assert said.count("reached       CPU: ") == 1
    assert run.main(["--check", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "H200" not in capsys.readouterr().out


def test_dispatch_lists_the_fastest_backend_of_each_size():
    lines = [json.loads(line) for line in dispatch([*GOOD, made("chunked", 8192, ms="9"), made("open_clip", 8192, ms="1")])]
    assert [(line["pairs"], line["fastest"]) for line in lines] == [(1024, "compiled"), (8192, "chunked"), (32768, "compiled")]
    assert lines[1]["ms"] == {"eager": 20.0, "compiled": 11.0, "chunked": 9.0}
