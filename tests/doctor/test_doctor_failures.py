"""What the doctor says where something is missing or full: each provoked for real, and its remedy followed where that can be done here."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megakd.doctor import places, ranks
from megakd.doctor.examine import PROBES, _examined
from megakd.doctor.finding import Finding, Place
from megakd.runtime import compiler as compilers
from support.processes import files_at_most, python, start
from support.runs import REPOSITORY, environment

pytestmark = pytest.mark.timeout(900)  # ranks and loader processes are started, which takes minutes on a machine that is busy


def looked(name: str, place: Place | None = None) -> Finding:
    """The only finding of a probe, also where it raises."""
    (probe,) = (probe for probe in PROBES if probe.name == name)
    ((_, (finding,), _),) = _examined(place or Place(Path("runs")), [probe])
    return finding


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no right to mount here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_run_folder_on_a_small_disk_fails_and_has_room_afterwards(small_disk: Path) -> None:
    place = Place(small_disk / "runs" / "mine")
    before = looked("out", place)
    assert (before.mark, before.remedy) == ("fails", "make room there or choose another --out")
    assert before.facts["free_bytes"] == 1 << 20
    subprocess.run(["mount", "-o", "remount,size=1g", small_disk], check=True)
    after = looked("out", place)
    assert after.mark == "partly", after
    assert "want 5.4 GB" in after.said
    assert not place.out.parent.exists()


def test_small_shared_memory_fails_and_no_process_is_started(small_disk: Path) -> None:
    """The disk takes the place of /dev/shm in a mount namespace of the doctor's own, as in a container."""
    look = f"mount --bind {small_disk} /dev/shm && exec {sys.executable} -m megakd.cli doctor --only loader --json"
    out, err = start("unshare", "--mount", "sh", "-c", look).communicate()
    found = {row["name"]: row for row in json.loads(out)["findings"]}
    assert found["shared_memory"]["mark"] == "fails", err
    assert "--shm-size" in found["shared_memory"]["remedy"]
    assert "not tried" in found["processes"]["said"]


def test_a_limit_on_files_sizes_is_the_runs_failure(tmp_path: Path) -> None:
    with files_at_most(1 << 20):
        found = looked("out", Place(tmp_path / "runs"))
    assert found.mark == "fails"
    assert "File too large" in found.said
    assert found.remedy.startswith("make room there or choose another --out")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "operators"))
    found = {finding.name: finding for finding in places.caches(Place(tmp_path, tmp_path / "file"))}
    assert (found["operators"].mark, found["operators"].remedy) == ("partly", "name another: export TORCH_EXTENSIONS_DIR=FOLDER")
    assert found["cache"].mark == "partly"
    assert found["temporary"].mark == "ok"


def test_a_limit_of_open_files_can_be_raised_as_it_says() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        found = looked("open_files")
        assert found.mark == "fails"
        asked = re.match(r"ulimit -n (\d+) ", found.remedy)
        assert asked, found
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(asked[1]), hard))
        assert looked("open_files").mark == "ok"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_hard_limit_of_open_files_is_the_administrators_and_the_exit_code_is_one() -> None:
    limited = python(
        "-m",
        "megakd.cli",
        "doctor",
        "--only",
        "loader",
        "--json",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300)),
    )
    out, err = limited.communicate()
    assert limited.returncode == 1, err
    found = {row["name"]: row for row in json.loads(out)["findings"]}
    assert found["open_files"]["remedy"].startswith("the administrator raises the limit")
    assert found["processes"]["mark"] == "ok", found


def test_without_a_compiler_some_recipes_fail_until_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import megakd.runtime.engine  # noqa: F401 - puts this environment's programs on PATH, which is replaced next

    compiler, ninja = shutil.which("c++"), shutil.which("ninja")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = looked("compiler")
    assert (found.mark, found.said.split(":")[0]) == ("partly", "no C++ compiler (c++)")
    assert "export CXX=" in found.remedy
    if compiler is None or ninja is None:
        pytest.skip("no compiler here to name")
    monkeypatch.setenv("CXX", compiler)
    assert looked("compiler").remedy == "pip install ninja"
    (tmp_path / "ninja").symlink_to(ninja)
    assert looked("compiler").mark == "ok"


def test_a_compiler_without_headers_says_which(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler here")
    reason = compilers.refusal([compiler, "-x", "c++", "-include", "not_there.h"])
    assert reason is not None
    assert "not_there.h" in reason


@pytest.mark.parametrize(
    ("variables", "said", "remedy"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE = 4 is set but RANK is not", "start with torchrun, deepspeed or srun"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "not-there.invalid", "MASTER_PORT": "29500"},
            "rank 1 of 2, which meet at not-there.invalid:29500: that name has no address here",
            "export MASTER_ADDR=",
        ),
    ],
)
def test_a_launchers_variables_that_cannot_work_fail(
    variables: dict[str, str], said: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = looked("launcher")
    assert found.mark == "fails"
    assert found.said.startswith(said)
    assert found.remedy.startswith(remedy)


def test_ranks_that_cannot_meet_fail_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "not-there")
    found = looked("gloo")
    assert found.mark == "fails"
    assert "not-there" in found.said
    assert "GLOO_SOCKET_IFNAME" in found.remedy


def test_a_mistaken_precision_fails_and_a_rehearsal_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAKD_PRECISION", "fp8")
    found = looked("precision")
    assert (found.mark, found.remedy[:14]) == ("fails", "set it to bf16")
    monkeypatch.setenv("MEGAKD_PRECISION", "bf16")
    assert looked("precision").mark == "slow"


def test_an_environment_without_torch_and_with_an_old_package_says_what_to_install(tmp_path: Path) -> None:
    """This environment's packages, as links in another folder: no torch, and bitsandbytes of another version."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.endswith(".pth") and not re.match(r"torch(-|$)|bitsandbytes-", entry.name):
            (packages / entry.name).symlink_to(entry)
    (packages / "bitsandbytes-0.1.dist-info").mkdir()
    (packages / "bitsandbytes-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.1\n")
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels", packages)))
    done = subprocess.run(
        [sys.executable, "-S", "-m", "megakd.cli", "doctor"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=environment(HF_HUB_OFFLINE="1") | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "torch is not installed; bitsandbytes is 0.1, and megakd asks for <1,>=0.48" in done.stdout
    assert "-> pip install 'torch<3,>=2.11' 'bitsandbytes<1,>=0.48'" in done.stdout
    assert done.stdout.count("-> as of versions.imports") >= 5
    assert "training would fail here: versions.packages, versions.imports" in done.stdout


def test_a_rank_that_fails_is_named_at_once_and_leaves_no_process() -> None:
    """Its port is taken, to which the other one would go on connecting."""
    with socket.create_server(("localhost", 0)) as taken:
        found = ranks._together(2, MASTER_PORT=str(taken.getsockname()[1]))
    assert isinstance(found, str)
    assert re.match(r"rank 0: MASTER_PORT = \d+: another program on this machine has this port", found), found
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    assert not [pid for pid in children if "one_rank.py" in Path(f"/proc/{pid}/cmdline").read_text()]
