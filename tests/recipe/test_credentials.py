"""Credentials in URLs reach no file and no message, and the run that they belong to can still be told apart and replayed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from megakd.data.storage import file_label
from megakd.recipe import credentials
from megakd.recipe import load as recipes
from megakd.runtime import run_folder
from megakd.runtime.exits import EXIT_USER_ERROR
from megakd.runtime.run_folder import RunLog
from support.runs import train


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA1:se/cr+et@bucket/a/{00000..00001}.tar", "s3://***@bucket/a/{00000..00001}.tar"),
        ("cannot read 'https://user:p@ss@host/x.tar' (403)", "cannot read 'https://***@host/x.tar' (403)"),
        ("https://hf_token@host/x", "https://***@host/x"),
        ("https://h/x.tar?token=abc&width=3&X-Amz-Signature=f%3D", "https://h/x.tar?token=***&width=3&X-Amz-Signature=***"),
        ("https://h/x?sv=1&sig=a::s3://k:s@b/x", "https://h/x?sv=1&sig=***::s3://***@b/x"),
        ("pipe:curl -s https://u:p@h/x?key=1", "pipe:curl -s https://***@h/x?key=***"),
        *((same, same) for same in ("https://host:8080/a@b.tar", "s3://bucket/a@b.tar", "hf://datasets/u/x@main/y", "http://[::1]:80/a@b")),
        *((same, same) for same in ("https://h/x?design=1&size=2", "token=abc in no URL", "sftp://me@host/x")),
    ],
)
def test_what_is_secret_in_a_url_is_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert credentials.redact(text) == shown
    assert credentials.redact(shown) == shown


SECRETS = ("s3://AKIA1:se/cr+et@bucket/{0..1}.tar", "https://h/0.tar?X-Amz-Credential=se/cr&X-Amz-Signature=cr+et")


def _holds_no_secret(text: str) -> bool:
    return not any(part in text for part in ("AKIA1", "se/cr", "cr+et", "wandb-secret"))


@pytest.mark.parametrize("url", SECRETS)
def test_run_json_and_metrics_hold_no_secret_and_the_same_run_goes_on(
    recipe_file: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipes.load(str(recipe_file), [f"data.train={url}"])[0]
    monkeypatch.setattr("sys.argv", ["train.py", "--set", f"data.train={url}"])
    log = RunLog(tmp_path, main=True)
    log.open(recipe, {"wandb": {"api_key": "wandb-secret"}}, 1)
    log.event(1, "bad", {"example": f"{url}: 00001"})
    log.say(f"reading {url}")
    written = "".join(path.read_text() for path in tmp_path.iterdir()) + capsys.readouterr().out
    assert _holds_no_secret(written)
    assert "***" in written
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    run_folder.check_resume(tmp_path, "auto", recipe)
    assert run_folder.changes(tmp_path, recipe) == []
    with pytest.raises(ValueError, match=r"data\.train = .*\*\*\*.*give the whole value again, with --set data\.train"):
        recipes.load(str(tmp_path / "run.json"))
    assert recipes.load(str(tmp_path / "run.json"), [f"data.train={url}"])[0] == recipe


def test_an_error_of_the_program_and_a_log_hold_no_secret(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = train(recipe_file, "--out", tmp_path / "run", sets=("data.train=memory://AKIA1:se/cr+et@bucket/x.tar",))
    assert finished.code == EXIT_USER_ERROR
    assert "memory://***@bucket/x.tar" in finished.err
    assert _holds_no_secret(finished.out + finished.err)


def test_logged_lines_hold_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    credentials.keep_out_of_logs()
    handler = logging.getLogger().handlers[0]
    record = logging.LogRecord("fsspec", logging.WARNING, "", 0, "retrying %s", (SECRETS[0],), None)
    assert all(handler.filters[number].filter(record) for number in range(len(handler.filters)))  # type: ignore[union-attr]
    assert _holds_no_secret(record.getMessage())


def test_a_url_that_is_signed_anew_names_the_same_index() -> None:
    one, other = (f"https://h/a/00001.tar?X-Amz-Date={day}&X-Amz-Signature={day}f" for day in (1, 2))
    assert file_label(one) == file_label(other)
    assert file_label(one).endswith("-00001.tar")
    assert "se" not in file_label(SECRETS[0]).rsplit("-", 1)[-1]
    assert file_label("https://h/get?file=1.tar") != file_label("https://h/get?file=2.tar")


def test_a_run_json_of_ours_stays_json(tmp_path: Path) -> None:
    run_folder.write_json(tmp_path / "a.json", {"b": ["https://u:p@h/x", 1, None, {"c": 2.5}]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": ["https://***@h/x", 1, None, {"c": 2.5}]}
