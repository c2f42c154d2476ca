"""The two archives: they build from a checkout, hold every package, and import from anywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), built from the files that git tracks, without network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for package in ("megakd", "kernels"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path):
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)], check=True, capture_output=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_holds_both_packages_and_the_recipes(archives: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(archives[0]).namelist())
    assert {"megakd/train.py", "megakd/recipes/smoke.toml", "megakd_kernels/__init__.py", "megakd/py.typed"} <= names
    assert not any(name.startswith(("kernels/", "tests/")) for name in names)


def test_no_message_sends_people_to_an_index_that_has_no_megakd() -> None:
    sources = {path: path.read_text(encoding="utf-8") for folder in ("megakd", "kernels") for path in (ROOT / folder).rglob("*.py")}
    assert [str(path) for path, text in sources.items() if re.search(r"pip install ['\"]?megakd", text)] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = [name for text in sources.values() for names in re.findall(r"-e '\.\[(.+?)\]'", text) for name in names.split(",")]
    assert named
    assert set(named) <= set(extras)


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
