"""The two archives: they build from what git tracks, hold every package, and work where there is no checkout.

`make release` runs all of these on the archives that it has built, which it names in MEGAKD_RELEASE.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import megakd
from support.library_environments import beside_ours

ROOT = Path(__file__).parents[1]
PACKED = ("pyproject.toml", "README.md", "LICENSE", "megakd", "kernels")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _tracked(*below: str) -> list[Path]:
    """Files of the repository that git tracks, but for those that are gone from the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z", *below], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), built from the files that git tracks, without network; or those of `make release`."""
    out = Path(os.environ.get("MEGAKD_RELEASE") or tmp_path_factory.mktemp("dist"))
    if "MEGAKD_RELEASE" not in os.environ:
        source = tmp_path_factory.mktemp("source")
        for path in _tracked(*PACKED):
            target = source / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / path).read_bytes())
        subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)], check=True, capture_output=True
        )
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a new environment with the wheel in it. What the wheel depends on is seen through a path file, which spares minutes
    and gigabytes; this environment's editable megakd is not, because an editable install takes effect in its own site-packages alone."""
    folder = tmp_path_factory.mktemp("installed")
    python = beside_ours(folder)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", str(archives[0])]
    subprocess.run(pip, check=True, capture_output=True)
    return python


def _outside(folder: Path, *arguments: str) -> str:
    """What a program of the new environment prints, started in a folder where nothing of the repository lies."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"DS_ACCELERATOR": "cpu", "COLUMNS": "140"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_the_wheel_holds_every_file_of_both_packages_but_pages_and_nothing_else(archives: tuple[Path, Path]) -> None:
    packed = {name for name in zipfile.ZipFile(archives[0]).namelist() if ".dist-info/" not in name}
    shown = {"examples", "results"}  # reports and measurements, which pages show
    tracked = {path for path in _tracked("megakd", "kernels/megakd_kernels") if path.suffix != ".md" and not shown & {*path.parts}}
    assert packed == {str(path.relative_to("kernels")) if path.parts[0] == "kernels" else str(path) for path in tracked}
    assert {Path(name).suffix for name in packed} >= {".py", ".toml", ".sh", ".typed"}


def test_every_library_that_the_packages_import_is_one_that_they_declare() -> None:
    """Without it the wheel would work here, where the tests' own libraries are, and nowhere else."""
    project = PYPROJECT["project"]
    extras = [name for extra, names in project["optional-dependencies"].items() if extra != "dev" for name in names]
    declared = {_normal(re.split(r"[<>=~!\[; ]", name)[0]) for name in [*project["dependencies"], *extras]}
    declared |= {"triton"}  # torch brings it where it has it; the kernels look for it
    optional = {"lmms-eval", "open-clip-train", "webdataset"}  # what a harness brings, and what a benchmark compares with
    owners = metadata.packages_distributions()
    imported = set()
    for path in _tracked("megakd/*.py", "kernels/megakd_kernels/*.py"):
        for line in re.findall(r"^ *(?:import|from) ([a-z_A-Z0-9]+)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE):
            if line not in sys.stdlib_module_names and line not in ("megakd", "megakd_kernels"):
                imported.add(_normal(owners.get(line, [line])[0]))
    assert imported - declared - optional == set()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_message_sends_people_to_an_index_that_has_no_megakd() -> None:
    sources = {path: path.read_text(encoding="utf-8") for folder in ("megakd", "kernels") for path in (ROOT / folder).rglob("*.py")}
    assert [str(path) for path, text in sources.items() if re.search(r"pip install ['\"]?megakd", text)] == []
    extras = PYPROJECT["project"]["optional-dependencies"]
    # Written out, or as the third argument of megakd.runtime.extras.library.
    written = [name for text in sources.values() for names in re.findall(r"-e '\.\[([\w,]+)\]'", text) for name in names.split(",")]
    given = [name for text in sources.values() for name in re.findall(r'\blibrary\("[\w.]+", "[^"]+", "(\w+)"', text)]
    assert written
    assert given
    assert {*written, *given} <= set(extras)


def test_the_sdist_builds_the_same_wheel(archives: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(archives[1]) as tar:
        tar.extractall(tmp_path, filter="data")
    source = next(tmp_path.iterdir())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    again = next((tmp_path / "dist").glob("*.whl"))
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(archives[0]).namelist())


def test_the_installed_wheel_imports_and_shadows_no_package_called_kernels(archives: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(archives[0])]
    subprocess.run(pip, check=True, capture_output=True)
    # A package of that name, as the one on the package index that transformers and bitsandbytes import.
    (target / "kernels").mkdir()
    (target / "kernels" / "__init__.py").write_text("CUDAProperties = 'theirs'\n")
    imports = "import megakd, megakd_kernels, kernels, megakd.recipe; print(megakd.__file__, kernels.CUDAProperties)"
    code = f"import sys; sys.path.insert(0, {str(target)!r}); {imports}"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert str(target) in found
    assert "theirs" in found


def test_the_commands_of_the_installed_wheel_say_what_they_take(installed: Path, tmp_path: Path) -> None:
    command = str(installed.with_name("megakd"))
    assert _outside(tmp_path, command, "--version").strip().endswith(megakd.__version__)
    assert "megakd/train.py" in _outside(tmp_path, command, "--help")
    assert "--seeds" in _outside(tmp_path, command, "smoke", "--help")
    where = _outside(tmp_path, str(installed), "-c", "import megakd, megakd_kernels; print(megakd.__file__, megakd_kernels.__file__)")
    assert where.count(str(installed.parents[1])) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_installed_wheel_trains_evaluates_and_submits_where_there_is_no_checkout(installed: Path, tmp_path: Path) -> None:
    command = str(installed.with_name("megakd"))
    train = next(installed.parents[1].glob("lib/python*/site-packages/megakd/train.py"))
    _outside(tmp_path, command, "shapes", "data/shapes", "--train", "64", "--test", "16")
    small = [part for item in ("optim.steps=4", "optim.warmup=1", "optim.batch=16") for part in ("--set", item)]
    shown = _outside(tmp_path, str(installed), str(train), "--recipe", "smoke_teacher", *small, "--dry_run")
    assert "4 steps of batch 16" in shown
    assert not (tmp_path / "runs").exists()
    _outside(tmp_path, str(installed), str(train), "--recipe", "smoke_teacher", *small)
    scores = json.loads((tmp_path / "runs" / "smoke_teacher" / "evaluation.json").read_text())
    assert 0.0 <= scores["zero_shot"]["seen"]["top1"] <= 1.0
    batch = _outside(tmp_path, command, "submit", "--recipe", "smoke_teacher", "--gpus_per_node", "0", "--out", "other", "--dry_run")
    assert "scontrol requeue" in batch  # the shell file is in the wheel


def test_the_citation_tells_the_name_version_and_licence_of_the_package() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert (cited["title"], cited["version"], cited["license"]) == ("megakd", megakd.__version__, PYPROJECT["project"]["license"])
    assert PYPROJECT["project"]["description"] in " ".join(cited["abstract"].split())
