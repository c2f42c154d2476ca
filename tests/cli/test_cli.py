"""What `megakd` says of itself: the way to training, the version, and options that are all written alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from typer.testing import CliRunner

import megakd
from megakd.cli import app
from megakd.cli.options import from_fields
from megakd.jobs.resources import Resources
from megakd.planning.cluster import Cluster
from megakd.training.command import parser


def said(*arguments: str) -> str:
    finished = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200", "TERM": "dumb"})
    assert finished.exit_code == 0, finished.output
    return " ".join(finished.output.split())


def test_help_says_how_a_recipe_is_trained_which_no_verb_does() -> None:
    assert "deepspeed megakd/train.py --recipe NAME" in said("--help")
    assert "python megakd/train.py --help" in said("--help")


def test_help_and_version_are_instant_because_what_is_heavy_stays_out() -> None:
    heavy = "{'torch', 'pydantic', 'submitit'} & set(sys.modules)"
    code = f"import sys; from megakd import cli; cli.app(sys.argv[1:], standalone_mode=False); print({heavy})"
    for asked in ("--help", "--version"):
        finished = subprocess.run([sys.executable, "-c", code, asked], check=True, capture_output=True, text=True)
        assert finished.stdout.endswith("set()\n"), asked


def test_the_version_is_the_packages() -> None:
    assert said("--version") == f"megakd {megakd.__version__}"


def test_the_smoke_jobs_help_says_what_either_mode_runs_and_how_long() -> None:
    text = said("smoke", "--help")
    assert all(words in text for words in ("without KD", "random", "the teacher's", "ten minutes", "as many for --vqa"))


def _options(command: click.Command, path: str = "megakd") -> dict[str, list[str]]:
    found = {path: [name for option in command.params for name in option.opts if name.startswith("--")]}
    for name, inner in getattr(command, "commands", {}).items():
        found |= _options(inner, f"{path} {name}")
    return found


def test_options_of_several_words_have_underscores_in_every_verb_and_in_training() -> None:
    found = _options(typer.main.get_command(app))
    found["megakd/train.py"] = [name for action in parser()._actions for name in action.option_strings if name.startswith("--")]
    assert {path: names for path, names in found.items() if any("-" in name[2:] for name in names)} == {}
    assert "--caption_noise" in found["megakd shapes"]


def _given(owner: type, *arguments: str) -> object:
    """What a verb gets whose one parameter is of the dataclass `owner`."""
    received = []

    def verb(owned: Any) -> None:
        received.append(owned)

    verb.__annotations__["owned"] = owner
    small = typer.Typer()
    small.command()(from_fields(verb))
    finished = CliRunner().invoke(small, arguments, catch_exceptions=False)
    assert finished.exit_code == 0, finished.output
    return received[0]


def test_options_of_a_dataclass_have_its_defaults_and_their_own_names() -> None:
    assert _given(Resources) == Resources()
    assert _given(Resources, "--setup", "module load cuda", "--setup", "ulimit -n 99") == Resources(
        setup=("module load cuda", "ulimit -n 99")
    )
    assert _given(Cluster, "--gpus", "2", "--gpu_memory", "64", "--gpu", "cpu") == Cluster(2, 64.0, kind="cpu")
    with pytest.raises(ValueError, match="--gpus 0: give a positive number, or compare several by --sweep"):
        CliRunner().invoke(app, ["plan", "--recipe", "smoke", "--gpu_memory", "80"], catch_exceptions=False)


def test_the_shapes_options_reach_the_world(tmp_path: Path) -> None:
    out = said("shapes", str(tmp_path / "w"), "--train", "4", "--test", "2", "--caption_noise", "0", "--image_size", "48")
    assert "0 noisy" in out
    assert (tmp_path / "w" / "train").is_dir()
    with pytest.raises(ValueError, match="caption_noise"):
        CliRunner().invoke(app, ["shapes", str(tmp_path / "x"), "--caption_noise", "1.2"], catch_exceptions=False)
