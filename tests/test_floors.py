"""The house's rules, read from the source: who imports whom, how long a file may be, and which names are free."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from tiny_runs import REPOSITORY

# A unit is a module or a folder of the package. It imports from lower floors; inside a folder, everything may import everything.
FLOORS: dict[str, tuple[int, ...]] = {
    "megakd_kernels": (0,),
    "megakd": (0,),  # __init__.py, the version
    "megakd.recipes": (0,),
    "megakd.recipe": (1, 0),
    "megakd.recipe_files": (1, 1),
    "megakd.foreseen": (1, 2),
    "megakd.runtime": (1, 2),
    "megakd.models": (2,),
    "megakd.data": (2,),
    "megakd.objectives": (3,),
    "megakd.tasks": (4,),
    "megakd.evaluation": (4,),
    "megakd.trainer": (5,),
    "megakd.export": (5,),
    "megakd.job": (5,),
    "megakd.preparation": (5,),
    "megakd.assembly": (5,),
    "megakd.judging": (5,),
    "megakd.bundle": (5,),
    "megakd.answering": (5,),
    "megakd.harness": (6,),
    "megakd.harness_model": (6,),
    "megakd.bundle_files": (5,),
    "megakd.teaching": (5,),
    "megakd.embedding": (5,),
    "megakd.planner": (5,),
    "megakd.planning": (5,),
    "megakd.preview": (5,),
    "megakd.scoring": (5,),
    "megakd.cluster": (5,),
    "megakd.job_list": (5,),
    "megakd.start": (6,),
    "megakd.train": (6,),
    "megakd.jobs": (6,),
    "megakd.submission": (6,),
    "megakd.smoke": (6,),
    "megakd.smoke_vqa": (6,),
    "megakd.benchmarks": (6,),
    "megakd.cli": (6,),
}
# Single modules side by side on these floors may import each other, without a circle.
SHARED_FLOORS = ((5,), (6,))


def _name(path: Path) -> str:
    base = REPOSITORY / "kernels" if path.is_relative_to(REPOSITORY / "kernels") else REPOSITORY
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {_name(path): path for folder in ("megakd", "kernels/megakd_kernels") for path in sorted((REPOSITORY / folder).rglob("*.py"))}


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


def _own(name: str) -> bool:
    return name.split(".")[0] in ("megakd", "megakd_kernels")


def _unit(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("megakd.") else name.split(".")[0]


def _edges() -> Iterator[tuple[str, str]]:
    for importer, targets in IMPORTS.items():
        yield from ((importer, target) for target in sorted(targets) if _own(target))


def test_every_module_has_a_floor_and_every_floor_is_of_modules_that_are_there() -> None:
    assert {_unit(name) for name in SOURCES} == set(FLOORS)


def test_a_module_imports_from_lower_floors_and_its_own_folder_alone() -> None:
    wrong = []
    for importer, target in _edges():
        here, there = _unit(importer), _unit(target)
        beside = FLOORS[here] == FLOORS[there] and FLOORS[here] in SHARED_FLOORS
        if here != there and not beside and not FLOORS[there] < FLOORS[here]:
            wrong.append(f"{importer} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[there]})")
    assert wrong == []


def test_no_import_is_circular() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circular: {' -> '.join((*path[path.index(name) :], name))}"
        if name in done or name not in IMPORTS:
            return
        for target in sorted(IMPORTS[name]):
            if _own(target):
                visit(target, (*path, name))
        done.add(name)

    for name in SOURCES:
        visit(name, ())


def test_the_kernels_import_torch_triton_and_the_standard_library_alone() -> None:
    allowed = {"torch", "triton", "megakd_kernels", *sys.stdlib_module_names}
    foreign = {name: {target.split(".")[0] for target in IMPORTS[name]} - allowed for name in SOURCES if _unit(name) == "megakd_kernels"}
    assert {name: found for name, found in foreign.items() if found} == {}


def test_the_engine_alone_imports_deepspeed() -> None:
    importers = {name for name, targets in IMPORTS.items() if any(target.split(".")[0] == "deepspeed" for target in targets)}
    assert importers == {"megakd.runtime.engine"}


def test_nobody_imports_the_entry_point() -> None:
    assert [edge for edge in _edges() if edge[1] == "megakd.train"] == []


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_is_longer_than_400_lines(name: str) -> None:
    assert len(SOURCES[name].read_text(encoding="utf-8").splitlines()) <= 400


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
