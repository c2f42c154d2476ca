"""`megakd data check` counts what training would drop, by training's own reading, and says facts of the rest."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from PIL import Image
from typer.testing import CliRunner

from megakd.cli import app
from megakd.data import own_tokenizer
from megakd.data.bad_samples import BadCounter, BadSample, located
from megakd.data.check.measure import SIGNALS, TokenCounter, measure
from megakd.data.check.summary import Repeats
from megakd.data.pairs import opened_pair
from megakd.data.shards import ShardSet
from megakd.training import checked_data
from support.shards import Member, bomb_png, data, jpeg, no_barrier, pair, write_set, write_tar


def checked(*arguments: object) -> tuple[int, dict[str, Any]]:
    """(exit code, what --json prints)"""
    told = CliRunner().invoke(app, ["data", "check", *map(str, arguments), "--json"], catch_exceptions=False)
    return told.exit_code, json.loads(told.stdout)


def png(number: int, size: tuple[int, int] = (40, 30), level: int = 6) -> bytes:
    file = io.BytesIO()
    with Image.open(io.BytesIO(jpeg(number, size))) as image:
        image.save(file, "PNG", compress_level=level)
    return file.getvalue()


def damaged(folder: Path) -> Path:
    """Forty sound samples and one of each kind that training drops when it reads it."""
    broken: list[Member] = [
        *[("bytes.jpg", jpeg(1)[:400]), ("bytes.txt", b"cut short")],
        *[("latin.jpg", jpeg(2)), ("latin.txt", b"gr\xfcn")],
        *[("blank.jpg", jpeg(3)), ("blank.txt", b" \n")],
        *[("nothing.jpg", jpeg(4)), ("nothing.txt", b"")],
        *[("bomb.png", bomb_png(90_000, 90_000)), ("bomb.txt", b"large")],
        *[("thin.jpg", jpeg(5, (450, 2))), ("thin.txt", b"thin")],
        ("alone.jpg", jpeg(6)),
        ("words.txt", b"no picture"),
    ]
    return write_tar(folder / "0.tar", [member for number in range(40) for member in pair(f"{number:03d}", number)] + broken)


def test_a_clean_set_is_one_that_a_run_would_train_on(tmp_path: Path) -> None:
    code, found = checked(write_set(tmp_path, 43, 3))
    assert code == 0
    assert (found["shards"], found["samples"], found["read"], found["usable"], found["lost"]) == (3, 43, 43, 43, 0)
    assert found["dropped"] == {"by_indexes": {}, "by_reading": {}}
    assert found["refused"] == []
    assert found["quantiles"]["width"] == dict.fromkeys(found["quantiles"]["width"], 40)
    assert found["quantiles"]["characters"]["most"] == len("caption 42")
    assert found["formats"] == {"JPEG": 43}
    assert found["repeats"]["images"] == {"distinct": 43, "repeated": 0, "groups": []}


def test_what_is_dropped_is_what_training_drops_by_the_same_reasons(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    code, found = checked(path)
    shards, training = ShardSet.open_set(str(path), data(str(path)), 0, 1, no_barrier), BadCounter()
    for sample in shards.read_each(list(range(len(shards))), ("image", "caption")):
        try:
            if isinstance(sample, BadSample):
                raise sample
            with located(sample.where):
                opened_pair(sample, shards.captions, shards.data)
        except BadSample as bad:
            training.add(bad.reason, str(bad))
    by_reading = found["dropped"]["by_reading"]
    assert {reason: one["count"] for reason, one in by_reading.items()} == training.counts
    assert {reason: one["example"] for reason, one in by_reading.items()} == training.examples
    assert training.counts == {
        "corrupt_image": 1, "bad_text": 1, "empty_caption": 2, "too_large": 1, "too_thin": 1, "missing_caption": 1, "missing_image": 1
    }  # fmt: skip
    assert found["usable"] == 40
    assert code == 1
    assert any("8 of 48 samples are unusable (16.67%)" in reason for reason in found["refused"])


def test_a_run_that_allows_more_bad_samples_is_not_refused(tmp_path: Path) -> None:
    code, found = checked(damaged(tmp_path), "--set", "data.max_bad_fraction=0.2", "--set", "data.workers=0")
    assert (code, found["refused"], found["bad_fraction"]["by_reading"]) == (0, [], pytest.approx(8 / 48))


def test_samples_that_a_damaged_tar_has_lost_are_counted_with_the_tar(tmp_path: Path) -> None:
    path = Path(write_set(tmp_path, 40, 2).replace("{00000..00001}", "00001"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, found = checked(f"{tmp_path}/*.tar")
    lost = found["dropped"]["by_indexes"]["truncated_tar"]
    assert 8 <= lost["count"] <= 12
    assert found["lost"] == lost["count"]
    assert "00001.tar" in lost["example"]
    assert found["samples"] + found["lost"] == 40
    assert code == 1


def test_captions_are_counted_by_source_and_a_field_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    def members(number: int, content: object) -> list[Member]:
        return [*pair(f"{number}", number)[:2], (f"{number}.json", json.dumps(content).encode())]

    contents = [{"re": ["long one", "long two"]}, {"re": "long three"}, {"other": 1}, {"re": 5}]
    path = write_tar(tmp_path / "0.tar", [one for number, content in enumerate(contents * 5) for one in members(number, content)])
    sets = ("--set", 'data.captions={ txt = 0.25, "json:re" = 0.75 }', "--set", "data.max_bad_fraction=0.5")
    code, found = checked(path, *sets)
    assert (code, found["usable"]) == (0, 15)
    assert found["captions"] == {
        "json:re": {"share": 0.75, "samples": 10, "captions": 15}, "txt": {"share": 0.25, "samples": 15, "captions": 15}
    }  # fmt: skip
    assert found["dropped"]["by_reading"]["bad_json"]["count"] == 5
    assert "json:re holds a number, where a text or a list" in found["dropped"]["by_reading"]["bad_json"]["example"]
    assert {group["text"] for group in found["repeats"]["captions"]["groups"]} <= {"long one", "long two", "long three"}
    told = CliRunner().invoke(app, ["data", "check", str(path), *sets, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert "Captions by source" in told.stdout
    assert "Captions are drawn: 0.75 json:re, 0.25 txt; tokens" in told.stdout.replace("\n", " ")
    assert "Captions by source" in (tmp_path / "out" / "check.html").read_text()
    code, found = checked(path, "--set", 'data.captions={ txt = 1, "json:er" = 1 }')
    assert code == 1
    assert "'json:er': none of 20 .json members" in found["refused"][0]
    assert checked(path)[1]["captions"] == {}


def test_a_part_of_the_samples_is_evenly_spaced_and_said_to_be_one(tmp_path: Path) -> None:
    pattern = write_set(tmp_path, 43, 3)
    told = CliRunner().invoke(app, ["data", "check", pattern, "--samples", "10"], catch_exceptions=False)
    assert told.exit_code == 0
    assert "10 were read, evenly spaced" in told.stdout
    _, found = checked(pattern, "--samples", "10")
    assert (found["samples"], found["read"], found["usable"]) == (43, 10, 10)
    assert found["quantiles"]["characters"] == {**dict.fromkeys(found["quantiles"]["characters"], 10), "least": 9, "1 %": 9, "10 %": 9}
    assert checked(pattern, "--samples", "1000")[1]["read"] == 43


@pytest.mark.usefixtures("no_process_is_left")
def test_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    write_tar(tmp_path / "1.tar", [member for number in range(200) for member in pair(f"{number:03d}", number % 9)])
    found = [checked(path, tmp_path / "1.tar", "--set", f"data.workers={workers}") for workers in (0, 2)]
    assert found[0] == found[1]


def test_equal_pictures_in_other_files_and_equal_captions_are_found_and_the_commonest_named(tmp_path: Path) -> None:
    members = [member for number in range(20) for member in pair(f"{number:03d}", number)]
    members += [("a.png", png(30, level=1)), ("a.txt", b"a stock photo"), ("b.png", png(30, level=9)), ("b.txt", b"a stock photo")]
    members += [("c.png", png(31)), ("c.txt", b" a stock photo\n"), ("d.jpg", jpeg(7)), ("d.txt", b"caption 7")]
    path = write_tar(tmp_path / "0.tar", members)
    _, found = checked(path)
    images, captions, pairs = (found["repeats"][name] for name in ("images", "captions", "pairs"))
    assert images["repeated"] == 2
    assert [group["samples"] for group in images["groups"]] == [[f"{path}: 007", f"{path}: d"], [f"{path}: a", f"{path}: b"]]
    assert (captions["groups"][0]["count"], captions["groups"][0]["text"]) == (3, "a stock photo")
    assert captions["repeated"] == 3
    assert pairs["repeated"] == 2
    told = CliRunner().invoke(app, ["data", "check", str(path)], catch_exceptions=False).stdout
    assert "caption: a stock photo" in told


def test_groups_of_equal_rows_are_those_that_counting_finds() -> None:
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 12, (300, 2)).astype(np.uint64)
    index = np.arange(300) * 7
    found, counted = Repeats.of(index, keys[:, :1], keys[:, 1:]), Counter(map(tuple, keys.tolist()))
    assert (found.distinct, found.repeated) == (len(counted), 300 - len(counted))
    assert [group.count for group in found.groups] == sorted(counted.values(), reverse=True)[:8]
    for group in found.groups:
        members = [place for place in range(300) if keys[place].tolist() == keys[group.members[0] // 7].tolist()]
        assert group.members == tuple(place * 7 for place in members[:3])
        assert len(members) == group.count
    assert Repeats.of(index[:0], keys[:0]) == Repeats(0, 0, ())


def test_tokens_are_those_of_the_whole_caption_and_cut_ones_are_counted(tmp_path: Path) -> None:
    clip = open_clip.SimpleTokenizer(context_length=77)
    texts = ["a red square", "<end_of_text> is a word here", "word " * 75, "word " * 76, "word " * 300, "x " * 5000]
    counter = TokenCounter(clip)
    assert counter.length == 77
    assert counter(texts).tolist()[2:] == [77, 78, 302, 1024]
    assert counter(texts)[0] == (clip(["a red square"]) != 0).sum()
    assert counter(texts)[1] > 7  # not one token for the special word
    members = [one for number, text in enumerate(texts) for one in ((f"{number}.jpg", jpeg(number)), (f"{number}.txt", text.encode()))]
    _, found = checked(write_tar(tmp_path / "0.tar", members))
    assert found["tokens"] == {"context_length": 77, "cut": 3}
    assert found["quantiles"]["tokens"]["most"] == 1024


def test_a_tokenizer_of_ones_own_counts_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a red square\n" * 9, encoding="utf-8")
    own_tokenizer.write([str(tmp_path / "captions.txt")], tmp_path / "words", "words", 50, 5)
    counter = TokenCounter(open_clip.tokenizer.HFTokenizer(str(tmp_path / "words"), context_length=5))
    assert counter.length == 5
    assert counter(["a red square", "a", "a red red red square", "a " * 2000]).tolist() == [5, 3, 7, 1024]


def test_the_recipes_student_tokenizes_and_its_batch_must_be_there(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    code, found = checked("--recipe", recipe_file, "--samples", "50")  # its own data.train
    assert (code, found["samples"], found["tokens"]["context_length"]) == (0, 600, 32)
    code, found = checked(write_set(tmp_path, 10, 1), "--recipe", recipe_file)
    assert code == 1
    assert "optim.batch = 16" in found["refused"][0]


@pytest.mark.parametrize("teacher", ["timm:vit_tiny_patch16_224", "ViT-B-32"])
def test_captions_are_read_where_a_run_reads_them(teacher: str, recipe_file: Path, tmp_path: Path) -> None:
    sets = [f"teacher.model={teacher}", "teacher.pretrained=random", "objectives.contrastive=0", "objectives.feature=1"]
    path = write_tar(tmp_path / "0.tar", [(f"{number}.jpg", jpeg(number)) for number in range(20)])
    found = checked_data.request([str(path)], str(recipe_file), sets, None, None)
    assert found.captions == (teacher == "ViT-B-32")
    code, numbers = checked(path, "--recipe", recipe_file, *(word for one in sets for word in ("--set", one)))
    assert code == (1 if found.captions else 0)
    assert numbers["usable"] == (0 if found.captions else 20)


SIGNS = {
    "the name of a file": (["IMG_1234.jpg", "my cat.PNG"], ["a photo of img.jpg files", "jpg", "a/b.jpg"]),
    "with an address (http://, www.)": (["see https://x.example/a", "WWW.Example.org"], ["http and www", "awww."]),
    "without a letter": (["1234", "!!! 5"], ["5 a", "東"]),
    "a single word": (["cat"], ["a cat"]),
    "with HTML (tags, entities)": (["<b>a</b>", "x &amp; y", "a &#39; b"], ["1 < 2 > 0", "R & B; jazz", "AT&T"]),
    "with control or broken characters": (["a\x1b[31mb", "a\u202eb", "a\ufffdb"], ["a\tb\nc", "naïve 東京", "\U0001f469\u200d\U0001f680"]),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_odd_captions_are_known_by_what_they_are(name: str) -> None:
    odd, plain = SIGNS[name]
    assert [SIGNALS[name](text) for text in (*odd, *plain)] == [True] * len(odd) + [False] * len(plain)


@pytest.mark.parametrize("text", ["<a" * 500_000, "&a" * 500_000, "x" * 999_990 + ".jp", "www" * 330_000, "a.jpg/" * 160_000])
def test_a_hostile_caption_of_a_megabyte_takes_no_time(text: str) -> None:
    started = time.process_time()
    for is_so in SIGNALS.values():
        is_so(text)
    assert time.process_time() - started < 2


def test_a_sample_is_kept_as_53_bytes_and_unusable_ones_do_not_fill_the_memory(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [(f"{number:04d}.txt", b"no image") for number in range(500)])
    shards = ShardSet.open_set(str(path), data(str(path), workers=0), 0, 1, no_barrier)
    found = measure(shards, np.arange(500), None, True)
    assert found.rows.nbytes == 500 * 53
    assert (found.bad.counts, len(found.unusable)) == ({"missing_image": 500}, 8)
    code, numbers = checked(path)
    assert code == 1
    assert numbers["refused"][0] == "none of the 500 samples has both an image and a caption"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/nowhere/{0..3}.tar"], "no shard /nowhere/0.tar"),
        ([], "name them, as in"),
        (["/nowhere/0.tar", "--set", "optim.lr=1"], "take it out"),
        (["/nowhere/0.tar", "--set", "data.trian=x"], "data.trian"),
        (["/nowhere/0.tar", "--samples", "0"], "--samples 0: read one at least"),
        (["/nowhere/0.tar", "--out", "/dev/null/x"], "--out /dev/null/x"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_anything_is_read(arguments: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("?", r"\?")):
        CliRunner().invoke(app, ["data", "check", *arguments], catch_exceptions=False)


def test_remote_shards_are_read_as_in_training(tmp_path: Path) -> None:
    import fsspec

    pattern = write_set(tmp_path, 20, 2)
    memory = fsspec.filesystem("memory")
    for number in range(2):
        memory.pipe(f"/check/{number:05d}.tar", (tmp_path / f"{number:05d}.tar").read_bytes())
    there = checked("memory://check/{00000..00001}.tar", "--set", "data.workers=0", "--set", f"data.cache={tmp_path}/cache")
    here = checked(pattern)
    assert there[0] == here[0] == 0
    assert all(there[1][key] == here[1][key] for key in ("samples", "usable", "quantiles", "formats", "bytes"))
