"""`megakd doctor` on this machine: every row, as JSON and as a table, documented, and nothing changed."""

from __future__ import annotations

import functools
import json
import re
import socketserver
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from megakd.cli import app
from megakd.doctor import show, speed
from megakd.doctor.examine import PROBES, TOPICS, Examined, Probe, _examined, explained
from megakd.doctor.finding import Finding, Place
from megakd.models.int8 import matmul
from megakd.runtime.exits import EXIT_UNFIT
from megakd_kernels import choose
from support.processes import python
from support.runs import REPOSITORY, environment, megakd

pytestmark = pytest.mark.timeout(900)  # ranks and loader processes are started, which takes minutes on a machine that is busy
PAGE = (REPOSITORY / "megakd" / "doctor" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(*arguments: str, **variables: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """(exit code, findings by topic.name) of `megakd doctor --json`, in a process that has the variables, here."""
    looking = python("-m", "megakd.cli", "doctor", "--json", *arguments, cwd=Path.cwd(), env=environment(**variables))
    out, err = looking.communicate()
    assert looking.returncode in (0, EXIT_UNFIT), err
    content = json.loads(out)
    assert set(content) == {"megakd", "works", "seconds", "findings", "probes"}
    assert content["works"] == (looking.returncode == 0)
    assert all(set(row) == {"topic", "name", "mark", "said", "remedy", "facts"} for row in content["findings"])
    assert all(bool(row["remedy"]) == (row["mark"] != "ok") for row in content["findings"]), content
    return looking.returncode, {f"{row['topic']}.{row['name']}": row for row in content["findings"]}


def test_all_rows_are_there_documented_and_true_of_this_machine_and_nothing_is_written(tmp_path: Path) -> None:
    code, found = rows("--cache", "mine", HF_HUB_OFFLINE="1")
    assert [name for name in found if f"`{name}`" not in PAGE] == []
    assert {name.split(".")[0] for name in found} == set(TOPICS)
    assert "error" not in {key for name, row in found.items() if name != "kernels.bitsandbytes" for key in row["facts"]}, found
    assert code == (EXIT_UNFIT if any(row["mark"] == "fails" for row in found.values()) else 0)
    assert found["ranks.gloo"]["mark"] == found["versions.packages"]["mark"] == "ok"
    assert found["network.hub"]["facts"] == {"offline": True}
    assert list(tmp_path.iterdir()) == []


def test_the_choices_are_those_of_training() -> None:
    cpu = torch.device("cpu")
    _, found = rows("--only", "kernels")
    int8 = found["kernels.int8"]["facts"]
    assert int8["product"] == matmul.resolved("auto", cpu)
    assert int8["seconds"].keys() | int8["errors"].keys() == set(get_args(matmul.Product))
    chosen = {pairs: found[f"kernels.loss_{pairs}"]["facts"]["backend"] for pairs in speed.PAIRS}
    assert chosen == {pairs: choose("similarity_kd", pairs, cpu, torch.float32) for pairs in speed.PAIRS}


def test_the_table_has_a_heading_a_topic_and_a_remedy_below_what_is_not_ok(capsys: pytest.CaptureFixture[str]) -> None:
    (Path("file")).write_text("")
    assert megakd("doctor", "--only", "disk", "--out", "file/run") == EXIT_UNFIT
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "disk"
    assert re.match(r"fails   out +--out file/run: \S+/file is no folder$", lines[2]), lines
    assert lines[3].strip() == "-> choose another --out"
    assert lines[-1].startswith("training would fail here: disk.out; it took ")


def test_a_topic_that_is_unknown_is_a_mistake_of_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert megakd("doctor", "--only", "disks") == 2
    assert "--only disks: unknown; there are versions, devices" in capsys.readouterr().err
    help_text = " ".join(CliRunner().invoke(app, ["doctor", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output.split())
    assert f"{', '.join(TOPICS[:-1])} or {TOPICS[-1]}" in help_text


def test_what_a_probe_raises_is_a_row_and_one_cause_is_explained_once() -> None:
    def broken(_: Place) -> Iterator[Finding]:
        yield Finding("first", "ok", "fine")
        raise RuntimeError("no such thing")

    probes = [Probe("disk", "one", broken), Probe("disk", "two", broken, "partly")]
    one, two = (each.findings for each in _examined(Place(Path("runs")), probes))
    assert [(finding.name, finding.mark) for finding in one] == [("first", "ok"), ("one", "fails")]
    assert one[1].said == "RuntimeError: no such thing"
    assert (two[1].mark, two[1].remedy) == ("partly", "as of disk.one")


def test_a_known_trouble_has_the_remedy_that_training_gives() -> None:
    what, remedy = explained(OSError(24, "Too many open files"))
    assert "Too many open files" in what
    assert remedy.startswith("too many files are open at once: raise the limit (ulimit -n")


def test_a_long_look_is_said_to_be_one() -> None:
    done = [Examined("versions", [Finding("imports", "slow", "long", "wait")], 25.0), Examined("disk", [Finding("out", "ok", "")], 1.0)]
    said = show._verdict(done, 26.0, [])
    assert said.startswith("training works here (1 slow); it took 26 s, where 20 are usual: the longest was versions (imports) with 25 s")
    assert "usual" not in show._verdict(done, 19.0, [])


def test_the_network_is_tried_for_a_short_while(tmp_path: Path) -> None:
    answering = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with socketserver.TCPServer(("127.0.0.1", 0), answering) as server:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _, answered = rows("--only", "network", **hub)
        server.shutdown()
    _, refused = rows("--only", "network", **hub)
    assert (answered["network.hub"]["mark"], answered["network.hub"]["facts"]["answer"]) == ("ok", 200)
    assert refused["network.hub"]["mark"] == "partly"
    assert "HF_HUB_OFFLINE=1" in refused["network.hub"]["remedy"]


def test_every_probe_has_a_name_of_its_own() -> None:
    names = [f"{probe.topic}.{probe.name}" for probe in PROBES]
    assert len(set(names)) == len(names)
