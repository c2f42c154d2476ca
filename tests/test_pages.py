"""The pages are true: links lead somewhere, commands and their options exist, the tree is the folder's, README is short."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from megakd import cli
from megakd.recipe import load as recipes
from megakd.training import command

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
PAGES = [name for name in LISTED if name and name != "CHANGELOG.md" and not name.startswith(".github/") and (ROOT / name).exists()]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _anchors(text: str) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _commands(page: str) -> Iterator[list[str]]:
    """Words of each command in a page's code blocks, without comments; a trailing backslash joins lines."""
    for language, block in BLOCK.findall(_text(page)):
        for line in () if language not in ("", "bash", "sh") else block.replace("\\\n", " ").splitlines():
            said = re.sub(r"^(?:\w+=\S* )+", "", line)  # VARIABLE=value command
            if said.split(" ")[0] in ("megakd", "deepspeed", "torchrun", "python", "srun", "sbatch", "make"):
                yield shlex.split(said, comments=True)


COMMANDS = [pytest.param(page, words, id=f"{page}: {' '.join(words)[:60]}") for page in PAGES for words in _commands(page)]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_or_a_heading(page: str) -> None:
    text, broken = _text(page), []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in _anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_every_path_of_the_repository_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"`((?:megakd|kernels|tests|slurm|ds_configs)/[\w./-]*)`", _text(page))
    assert [path for path in named if not (ROOT / path).exists()] == []


def _trainer_takes(words: list[str]) -> None:
    flags = command.parser().parse_args(words)
    if flags.recipe != "R.toml":  # the reader's own
        recipes.load(flags.recipe or "smoke", flags.overrides)
    assert flags.ds_config is None or (ROOT / flags.ds_config).is_file()


@pytest.mark.parametrize(("page", "words"), COMMANDS)
def test_every_command_of_a_page_is_one_that_its_program_takes(page: str, words: list[str]) -> None:
    """Options, verbs, shipped recipes, scripts and make's targets exist; nothing is run."""
    program, words = words[0], [word for word in words[1:] if word != "…"]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets)
    elif program == "sbatch":
        script = next(word for word in words if word.endswith(".sh"))
        assert (ROOT / script).is_file()
    elif program == "megakd":
        found: click.Command = typer.main.get_command(cli.app)
        name = "megakd"
        while isinstance(found, click.Group):
            name, words = words[0], words[1:]
            below = found.get_command(click.Context(found), name)
            assert below is not None, name
            found = below
        found.make_parser(click.Context(found)).parse_args(list(words))  # raises where an option is unknown
    elif "megakd/train.py" in words:
        _trainer_takes(words[words.index("megakd/train.py") + 1 :])


def test_readmes_recipe_is_planned_by_readmes_command(tmp_path: Path) -> None:
    text = _text("README.md")
    recipe = re.search(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    planned = re.search(r"megakd (plan --recipe R\.toml[^`\n]*)", text)
    assert recipe
    assert planned
    (tmp_path / "R.toml").write_text(recipe[1], encoding="utf-8")
    words = [str(tmp_path / "R.toml") if word == "R.toml" else word for word in shlex.split(planned[1])]
    done = subprocess.run([sys.executable, "-m", "megakd.cli", *words], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "student: ViT-S-32" in done.stdout


def test_readme_is_at_most_180_lines() -> None:
    assert len(_text("README.md").splitlines()) <= 180


def test_readmes_tree_has_each_package_once() -> None:
    listed = re.findall(r"^(megakd/\w+)/ ", _text("README.md"), re.MULTILINE)
    packages = [f"megakd/{path.parent.name}" for path in (ROOT / "megakd").glob("*/__init__.py")]
    assert sorted(listed) == sorted(packages)


def test_contributings_map_has_each_package() -> None:
    text = _text("CONTRIBUTING.md")
    assert [path.parent.name for path in (ROOT / "megakd").glob("*/__init__.py") if f"`{path.parent.name}/`" not in text] == []
