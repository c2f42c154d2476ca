"""The house's rules, read from the source: who imports whom, how long a file may be, and which names are free."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from support.runs import REPOSITORY, environment

# A package imports from the layers below its own. `megakd` is __init__.py with its public names, `megakd.train` the
# training program's entry point.
LAYERS = (
    {"megakd.recipe", "megakd.version", "megakd_kernels"},
    {"megakd.runtime"},
    {"megakd.data", "megakd.models"},
    {"megakd.objectives", "megakd.teachers", "megakd.vqa"},
    {"megakd.export"},
    {"megakd.planning"},
    {"megakd.benchmarks", "megakd.evaluation"},
    {"megakd.training"},
    {"megakd.jobs", "megakd.pages", "megakd.train"},
    {"megakd.doctor", "megakd.study"},
    {"megakd", "megakd.cli"},
)
LAYER = {package: number for number, layer in enumerate(LAYERS) for package in layer}
# The programs of kernels/benchmarks, started as files, import each other by their names alone.
KERNEL_BENCHMARKS = REPOSITORY / "kernels" / "benchmarks"


def _name(path: Path) -> str:
    for base in (KERNEL_BENCHMARKS, REPOSITORY / "kernels", REPOSITORY):
        if path.is_relative_to(base):
            return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
    raise AssertionError(path)


FOLDERS = (REPOSITORY / "megakd", REPOSITORY / "kernels" / "megakd_kernels", KERNEL_BENCHMARKS)
SOURCES = {_name(path): path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))}


def _imports(name: str) -> set[str]:
    """Modules that a module imports anywhere in it, inside functions too; `from package import module` counts as the module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: write the full name"
            assert node.module
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in SOURCES else node.module for alias in node.names}
    return found


IMPORTS = {name: _imports(name) for name in SOURCES}


def _package(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("megakd.") else name.split(".")[0]


def _edges() -> Iterator[tuple[str, str]]:
    for importer, targets in IMPORTS.items():
        yield from ((importer, target) for target in sorted(targets) if target in SOURCES)


def test_every_package_has_a_layer_and_every_layer_is_of_packages_that_are_there() -> None:
    assert {_package(name) for name, path in SOURCES.items() if not path.is_relative_to(KERNEL_BENCHMARKS)} == set(LAYER)


def test_a_package_imports_from_lower_layers_and_itself_alone() -> None:
    wrong = []
    for importer, target in _edges():
        here, there = _package(importer), _package(target)
        if here in LAYER and here != there and not LAYER[there] < LAYER[here]:
            wrong.append(f"{importer} (layer {LAYER[here]}) imports {target} (layer {LAYER[there]})")
    assert wrong == []


def test_no_import_is_circular() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circular: {' -> '.join((*path[path.index(name) :], name))}"
        if name in done or name not in IMPORTS:
            return
        for target in sorted(IMPORTS[name]):
            visit(target, (*path, name))
        done.add(name)

    for name in SOURCES:
        visit(name, ())


def test_the_root_of_the_package_holds_three_modules_at_most() -> None:
    assert len(list((REPOSITORY / "megakd").glob("*.py"))) <= 3


def test_the_kernels_import_torch_triton_and_the_standard_library_alone() -> None:
    allowed = {"torch", "triton", "megakd_kernels", *sys.stdlib_module_names}
    foreign = {name: {target.split(".")[0] for target in IMPORTS[name]} - allowed for name in SOURCES if _package(name) == "megakd_kernels"}
    assert {name: found for name, found in foreign.items() if found} == {}


def test_the_engine_alone_imports_deepspeed() -> None:
    importers = {name for name, targets in IMPORTS.items() if any(target.split(".")[0] == "deepspeed" for target in targets)}
    assert importers == {"megakd.runtime.engine"}


def test_nobody_imports_the_entry_point() -> None:
    assert [edge for edge in _edges() if edge[1] == "megakd.train"] == []


def test_recipes_are_read_and_signals_are_answered_before_torch_is_imported() -> None:
    """A task of a job notes signals from the moment its pickle, which names `megakd.jobs.Training`, is read; torch takes ten seconds."""
    light = "megakd.jobs, megakd.runtime.exits, megakd.recipe.load, megakd.recipe.chain"
    code = f"import sys, {light}; print(megakd.jobs.Training, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == "<class 'megakd.jobs.task.Training'> False\n"


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_is_longer_than_400_lines(name: str) -> None:
    assert len(SOURCES[name].read_text(encoding="utf-8").splitlines()) <= 400


def test_no_file_of_tests_is_longer_than_400_lines() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (REPOSITORY / "tests").rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_name_in_megakd_hides_a_librarys_when_the_folder_is_first_on_the_path() -> None:
    """`deepspeed megakd/train.py` puts megakd/ first on sys.path until train.py takes it off again."""
    names = {
        path.stem for path in (REPOSITORY / "megakd").iterdir() if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
    }
    installed = {top for top, owners in metadata.packages_distributions().items() if owners != ["megakd"]}
    assert names & (set(sys.stdlib_module_names) | installed) - {"__init__"} == set()


def test_the_kernels_folder_is_no_package() -> None:
    """A regular package `kernels` would hide the distribution of that name, which transformers imports."""
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by their names alone: two of one name end the collection."""
    names = Counter(path.name for path in (REPOSITORY / "tests").rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} <= {"conftest.py", "__init__.py"}


def test_vulture_finds_what_it_is_told_to_ignore_and_nothing_else() -> None:
    """A name on its list that nothing bears any more would hide the next one that is dead."""
    found: set[str] = set()
    for folders in (["megakd", "kernels"], ["megakd", "kernels", "tests"]):
        command = [str(Path(sys.executable).with_name("vulture")), *folders, "--ignore-names", "nothing"]
        found |= set(re.findall("'([^']+)'", subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout))
    ignored = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["vulture"]["ignore_names"]
    assert [pattern for pattern in ignored if not fnmatch.filter(found, pattern)] == []
    assert found - {name for pattern in ignored for name in fnmatch.filter(found, pattern)} == set()
