"""`megakd data tokenizer` makes what `student.tokenizer` takes, of lines and of shards' captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from open_clip.tokenizer import HFTokenizer
from typer.testing import CliRunner

from megakd.cli import app
from megakd.data import own_tokenizer
from support.runs import train
from support.shards import write_tar


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_a_run_trains_and_exports_with_it(kind: str, recipe_file: Path, world: Path, tmp_path: Path) -> None:
    shards = [str(path) for path in sorted((world / "train").glob("*.tar"))]
    out = tmp_path / "words"
    told = CliRunner().invoke(app, ["data", "tokenizer", *shards, "--out", str(out), "--kind", kind, "--words", "400", "--context", "32"])
    assert told.exit_code == 0, told.output
    size = int(told.output.partition("vocab_size = ")[2].partition(",")[0])
    assert size <= 400
    sets = (f"student.tokenizer={out}", f"student.architecture.text_cfg.vocab_size={size}")
    finished = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert finished.code == 0, finished.err
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_its_end_is_the_largest_number_and_its_texts_are_known(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a red zebra\nünter dem Baum\n\na Red square!\n" * 50, encoding="utf-8")
    size = own_tokenizer.write([str(tmp_path / "captions.txt")], tmp_path / "out", kind, 320, 16)
    tokens = HFTokenizer(str(tmp_path / "out"), context_length=16)(["a red zebra", "ünter dem Baum", "unseen 東"])
    assert tokens.max(1).values.tolist() == [size - 1] * 3
    unknown = 1
    assert unknown not in tokens[:2].flatten().tolist()
    assert (unknown in tokens[2].tolist()) == (kind == "words")


@pytest.mark.parametrize(
    ("content", "more", "told"),
    [
        (b"", {}, "not one text"),
        (b"\xff\xfe\x00a", {}, "not UTF-8"),
        (b"a red square", {"words": 100}, "300 at least"),
        (b"a red square", {"context": 1}, "3 tokens"),
    ],
)
def test_what_gives_no_tokenizer_is_refused(content: bytes, more: dict[str, int], told: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=told):
        own_tokenizer.write([str(tmp_path / "t.txt")], tmp_path / "out", "bpe", more.get("words", 400), more.get("context", 16))


def test_a_folder_that_is_there_and_a_file_that_is_not_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="is there already"):
        own_tokenizer.write([str(tmp_path / "out" / "mine")], tmp_path / "out", "bpe", 400, 16)
    with pytest.raises(ValueError, match="no such file"):
        own_tokenizer.write([str(tmp_path / "gone.txt")], tmp_path / "new", "bpe", 400, 16)
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="no tar"):
        own_tokenizer.write([str(tmp_path / "bad.tar")], tmp_path / "new", "bpe", 400, 16)


def test_captions_that_training_cannot_use_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = write_tar(tmp_path / "0.tar", [("a.txt", b"a red square"), ("b.txt", b"ein gr\xfcner Kreis"), ("c.txt", b"  \n")])
    own_tokenizer.write([str(shard)], tmp_path / "out", "words", 50, 16)
    words = (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8")
    assert "square" in words
    assert "ner" not in words
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["bad sample, bad_text", "bad sample, empty_caption"]
