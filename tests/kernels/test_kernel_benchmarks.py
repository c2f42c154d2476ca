"""The kernel benchmarks: what they write, and what becomes of a case that cannot be measured."""

from __future__ import annotations

import ast
import csv
import sys
import time
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from PIL import Image

from support.kernel_benchmarks import BENCHMARKS, GOOD, made

sys.path.insert(0, str(BENCHMARKS))
import measure
import plot
import run
from cases import LOSSES, LossCase
from measure import Meter, Timing, gradients
from memory import Watcher
from peers import Unavailable
from records import FIELDS, append, read
from rounds import Limits, Result, Runner
from rounds import rows as rows_of

sys.path.remove(str(BENCHMARKS))

TINY = ["--device", "cpu", "--widths", "16/24", "--rounds", "3"]
CPU = torch.device("cpu")


def benchmark(out: Path, *arguments: str) -> list[dict[str, str]]:
    assert run.main([*TINY, "--out", str(out), *arguments]) == 0
    (path,) = out.glob("*.csv")
    return read(path)


@pytest.fixture(scope="module", autouse=True)
def small_products():
    """The rate of matrix products is measured at a size that takes milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measure.MATRIX_SIZES, "cpu", (256,))
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two losses at two sizes by three backends, all of it real."""
    out = tmp_path_factory.mktemp("results")
    arguments = ["--sizes", "64", "100", "--losses", "similarity", "contrastive", "--implementations", "eager", "chunked", "auto"]
    return out, benchmark(out, *arguments)


def test_every_case_gets_a_row_for_each_pass_with_all_its_numbers(small):
    _, rows = small
    assert len(rows) == 2 * 2 * 3 * 3
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        assert all(row[name] for name in FIELDS if name != "note")
        assert float(row["p10_ms"]) <= float(row["median_ms"]) <= float(row["p90_ms"])
        assert int(row["rounds"]) >= 3


def test_a_second_run_appends_below_the_one_header(small, tmp_path):
    (path,) = small[0].glob("*.csv")
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    rows = benchmark(tmp_path, "--sizes", "64", "--losses", "contrastive", "--implementations", "eager", "--passes", "both")
    assert len(rows) == len(small[1]) + 1
    assert copy.read_text(encoding="utf-8").count("date,commit") == 1
    assert copy.read_bytes().startswith(path.read_bytes())


def test_the_plot_is_a_picture(small):
    (path,) = small[0].glob("*-teacher24.png")
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 1000


def test_the_table_compares_with_eager_and_lists_what_is_not_there(tmp_path, capsys):
    benchmark(tmp_path, "--sizes", "64", "--losses", "kd", "--implementations", "eager", "chunked", "triton", "--passes", "both")
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if " eager " in line and line.startswith("kd"))
    assert " 1.00 " in line
    assert "triton, kd: unavailable: " in said
    assert not any(" triton " in line for line in said.splitlines() if line.startswith("kd"))


def test_too_little_memory_makes_rows_and_only_for_those_who_store_the_matrix(tmp_path):
    rows = benchmark(tmp_path, "--sizes", "64", "--losses", "kd", "--implementations", "eager", "chunked", "--memory", "0.00001")
    found = {row["implementation"]: row["status"] for row in rows}
    assert found["eager"] == f"out of memory (predicted: {10 * 4 * 64**2 / 1e9:.1f} GB)"
    assert found["chunked"] == "ok"


def test_a_spent_budget_makes_rows_of_what_is_left(tmp_path):
    rows = benchmark(tmp_path, "--sizes", "64", "128k", "--losses", "contrastive", "--implementations", "eager", "chunked", "--budget", "0")
    assert len(rows) == 2 * 2 * 3
    assert all(row["status"].startswith(("skipped: time budget", "out of memory (predicted")) for row in rows)
    assert not any(row["median_ms"] for row in rows)


def test_a_long_case_is_not_begun_when_its_predicted_time_exceeds_what_is_left():
    limits = Limits(time.monotonic() + 30, memory=1e12, matrix_rate=1e18)
    case = LossCase("kd", 1024, 512, 1024, "chunked")
    assert limits.refusal(case) is None
    limits.learn(case, 0.5)
    assert limits.refusal(case) is None
    assert limits.refusal(case._replace(pairs=8192)).startswith("skipped: time budget (needs about 128 s)")  # 4 calls of 0.5 s * 64


def test_on_cuda_only_the_compiled_matrix_is_foreseen_not_to_fit():
    limits = Limits(float("inf"), memory=140e9, matrix_rate=1e18, tries_all=True)
    found = {name: limits.refusal(LossCase("similarity", 131072, 512, 1024, name)) for name in ("eager", "compiled", "auto")}
    assert found == {"eager": None, "compiled": "out of memory (predicted: 343.6 GB)", "auto": None}


def test_on_cuda_the_loss_and_sizes_of_the_targets_come_first():
    args = run._arguments(["--implementations", "eager"])
    order = [(cases[0].loss, cases[0].pairs, cases[0].teacher_width) for cases in run._groups(args, torch.device("cuda"))]
    assert order[:4] == [("similarity", pairs, 1024) for pairs in (8192, 32768, 131072, 1024)]
    assert len(order) == 5 * 8 * 2
    assert len(set(order)) == len(order)


class ScriptedMeter(Meter):
    """Takes no time; the calls and what goes wrong in them are given."""

    def __init__(self, faults):
        super().__init__(CPU)
        self.faults, self.calls = faults, []

    def sample(self, function, student, teacher):
        name = function.__name__
        self.calls.append(name)
        if name in self.faults:
            raise self.faults[name]
        return Timing(0.001, 0.002)


class NamedCase(LossCase):
    def function(self):
        def call():
            pass

        call.__name__ = self.implementation
        return call


def scripted(faults, rounds=4):
    meter = ScriptedMeter(faults)
    runner = Runner(meter, torch.float32, Limits(float("inf"), 1e12, 1e18), rounds)
    runner.close()
    return runner.group([NamedCase("kd", 16, 8, 8, name) for name in ("eager", "chunked", "open_clip")]), meter.calls


def test_implementations_take_turns():
    results, calls = scripted({})
    names = ["eager", "chunked", "open_clip"]
    assert calls == ["eager"] * 2 + ["chunked"] * 2 + ["open_clip"] * 2 + names * 4
    assert [len(result.samples) for result in results] == [4, 4, 4]


def test_running_out_of_memory_or_failing_is_a_row_and_the_others_are_measured():
    faults = {"eager": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB"), "open_clip": KeyError("a bug\nof theirs")}
    results, _ = scripted(faults)
    assert [result.status for result in results] == ["out of memory", "ok", "failed: KeyError 'a bug\\nof theirs'"]
    row = rows_of(results[0], ["both"], 1e12, {})[0]
    assert row["status"] == "out of memory"
    assert "median_ms" not in row


@pytest.mark.parametrize(
    ("case", "forward", "both"),
    [  # by hand, N = 10: a product of (10, d) by (d, 10) is 2 * 100 * d
        (LossCase("similarity", 10, 3, 5, "auto"), 100 * (2 * 3 + 2 * 5), 100 * (8 * 3 + 4 * 5)),
        (LossCase("kd", 10, 3, 5, "auto"), 1600, 4400),
        (LossCase("kd", 10, 3, 5, "liger"), 1600, 100 * (6 * 3 + 2 * 5)),
        (LossCase("contrastive", 10, 3, 5, "auto"), 600, 2400),
        (LossCase("interactive", 10, 5, 5, "auto"), 2 * 2 * 100 * 5, 2 * 4 * 100 * 5),
        (LossCase("sigmoid", 10, 3, 5, "auto"), 1600, 2800),
    ],
)
def test_ideal_operations_are_those_counted_by_hand(case, forward, both):
    assert (case.flops("forward"), case.flops("backward"), case.flops("both")) == (forward, both - forward, both)


def test_rates_are_the_ideal_operations_over_the_median():
    samples = [Timing(seconds, 0.0) for seconds in (1.0, 2.0, 9.0)]
    row = rows_of(Result(LossCase("similarity", 10, 3, 5, "auto"), "ok", samples), ["both"], 11e3, {})[0]
    assert float(row["tflops"]) == pytest.approx(4400 / 2 / 1e12)
    assert float(row["percent_of_matrix"]) == pytest.approx(20)
    assert (row["p10_ms"], row["median_ms"], row["p90_ms"]) == ("1200", "2000", "7600")


def test_peak_memory_on_the_cpu_counts_the_matrices_of_a_call():
    watcher, pairs = Watcher(), 1500
    try:
        peaks = {name: watcher.peaks(LossCase("similarity", pairs, 16, 16, name), torch.float32) for name in ("eager", "chunked")}
    finally:
        watcher.close()
    matrix = 4 * pairs**2
    assert 8 * matrix < peaks["eager"].both < 13 * matrix
    assert peaks["eager"].forward <= peaks["eager"].both
    assert peaks["chunked"].both < 7 * matrix  # at this size a panel is the whole matrix


@pytest.mark.parametrize(("loss", "peer"), [("similarity", "open_clip"), ("contrastive", "open_clip")])
def test_open_clip_is_given_the_same_problem(loss, peer):
    found = {}
    for name in (peer, "eager"):
        case = LossCase(loss, 33, 16, 24, name)
        student, teacher = case.inputs(CPU, torch.float32)
        found[name] = torch.autograd.grad(case.function()(student, teacher), student[:3])
    for theirs, ours in zip(found[peer], found["eager"], strict=True):
        assert torch.allclose(theirs, ours, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_can_be_differentiated_by_the_student(loss):
    case = LossCase(loss, 33, LOSSES[loss].student_width(16, 24), 24, "chunked")
    student, teacher = case.inputs(CPU, torch.float32)
    total = case.function()(student, teacher)
    assert total.shape == ()
    assert total > 0
    gradients(total, student)


def test_a_plot_is_drawn_from_a_file_with_gaps(tmp_path):
    path = tmp_path / "made.csv"
    append(path, [row for row in GOOD if row["pairs"] != "32768"] + [made("triton", 1024, ms="", mb="", status="failed: x", one="forward")])
    (picture,) = plot.draw(path, read(path))
    with Image.open(picture) as image:
        image.load()
    assert picture.name == "made-teacher1024.png"


def test_without_matplotlib_everything_else_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    rows = benchmark(tmp_path, "--sizes", "64", "--losses", "kd", "--implementations", "eager")
    assert rows
    assert "no plot was drawn: matplotlib is not installed" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


def test_copies_are_left_where_asked(tmp_path):
    copies = tmp_path / "copies"
    benchmark(tmp_path / "own", "--sizes", "64", "--losses", "kd", "--implementations", "eager", "--copy-to", str(copies))
    assert sorted(path.suffix for path in copies.iterdir()) == [".csv", ".png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "similarty"], "similarity"),
        (["--implementations", "tritn"], "triton_static"),
        (["--passes", "sideways"], "backward"),
        (["--sizes", "0"], "a size is a number of pairs such as 1024 or 1k, got 0"),
        (["--sizes", "many"], "many"),
        (["--widths", "512"], "widths are student/teacher such as 512/1024, got 512"),
    ],
)
def test_unknown_arguments_are_answered_with_the_choices(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        run.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_an_error_of_a_loss_does_not_pass_for_a_backend_that_is_not_there(monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setitem(LOSSES, "kd", LOSSES["kd"]._replace(compute=broken))
    cpu = torch.device("cpu")
    for implementation, error, words in (("chunked", ValueError, "a bug"), ("triton", Unavailable, "it needs a CUDA device")):
        case = LossCase("kd", 8, 4, 6, implementation)
        with pytest.raises(error, match=words):
            case.function()(*case.inputs(cpu, torch.float32))


def test_a_device_or_file_that_is_not_there_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert run.main(["--check", "--csv", str(tmp_path / "none.csv")]) == 2
    assert "none.csv: no results yet" in capsys.readouterr().err
    assert run.main(["--check", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path}: no results yet" in capsys.readouterr().err


def test_a_file_with_other_columns_is_left_alone(tmp_path, capsys):
    path = tmp_path / "old.csv"
    path.write_text("date,loss\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"old.csv was written with other columns \(date, loss\)"):
        append(path, GOOD)
    assert path.read_text(encoding="utf-8") == "date,loss\n"


def test_recorded_results_have_todays_columns():
    for path in (BENCHMARKS / "results").glob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            assert tuple(csv.DictReader(file).fieldnames or ()) == FIELDS


def test_the_benchmarks_import_each_other_without_a_circle():
    modules = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in BENCHMARKS.glob("*.py")}
    imports = {
        name: {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for name, tree in modules.items()
    }
    TopologicalSorter({name: targets & set(modules) for name, targets in imports.items()}).prepare()  # raises CycleError
    assert {"cases", "measure"} <= imports["run"]
