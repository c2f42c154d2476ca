"""A store of several captions: what `megakd embed` writes of each, what a run reads of it, and which recipes it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megakd.data.captions import CaptionPolicy
from megakd.data.shards import ShardSet
from megakd.data.store.reader import Store, StoreError
from megakd.data.transforms import TowerView, normalise
from megakd.models import clip
from megakd.models.fingerprint import preprocessing
from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from megakd.runtime.launch import World
from megakd.teachers.build import live_teacher, open_store
from megakd.teachers.embed import EmbedJob
from megakd.teachers.embed_request import EmbedRequest
from support.loaders import take
from support.runs import KD, losses, rows, train
from support.shards import jpeg, no_barrier, write_tar

ALONE = World(0, 1, torch.device("cpu"))
CAPTIONS = 'data.captions={ txt = 0.5, "json:more" = 0.5 }'
WORDS = ("red", "green", "blue", "square", "circle", "small", "large")
SETS = (*KD, CAPTIONS, "optim.batch=16", "optim.steps=5", "log.every=1")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 samples with a text and none to two more; one has an image that is none."""
    members = []
    for number in range(40):
        said = [f"a {WORDS[(number + place) % 7]} {WORDS[place]}" for place in range(number % 3)]
        image = b"none" if number == 11 else jpeg(number)
        content = json.dumps({"more": said}).encode()
        members += [(f"{number}.jpg", image), (f"{number}.txt", f"a {WORDS[number % 7]} square".encode()), (f"{number}.json", content)]
    return write_tar(tmp_path_factory.mktemp("captions") / "0.tar", members)


@pytest.fixture(scope="module")
def sets(shards: Path) -> tuple[str, ...]:
    return (*SETS, f"data.train={shards}", "data.max_bad_fraction=0.5")


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, sets: tuple[str, ...]) -> Recipe:
    return recipes.load(str(recipe_file), sets)[0]


def job(recipe: Recipe, out: Path) -> EmbedJob:
    return EmbedJob(recipe, EmbedRequest(out, 2, "fp32"), ALONE, part=16)


@pytest.fixture(scope="module")
def store(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "store"
    job(recipe, out).embed()
    return out


def test_the_rows_of_the_drawn_captions_are_what_the_live_teacher_makes_of_them(recipe: Recipe, store: Path) -> None:
    opened = Store.open(store)
    assert opened.layout.captions == 2
    assert [facts.texts for facts in opened.parts.values()] == [
        sum(1 + n % 3 for n in range(first, min(first + 16, 40)) if n != 11) for first in (0, 16, 32)
    ]
    assert recipe.teacher is not None
    description = clip.resolve(recipe.teacher, "teacher")
    shards = ShardSet.open(recipe.data, 0, 1, no_barrier)
    teacher = live_teacher(recipe, description, ALONE, shards, piece=16)
    view = TowerView(preprocessing(description), description.tokenize)
    for batch in take(shards, 12, store=opened, towers={"teacher": view}):
        found = teacher.embed(normalise(batch.pixels["teacher"], view.preprocess, torch.float32), batch.tokens["teacher"])
        assert batch.stored is not None
        assert batch.stored.known.all()
        torch.testing.assert_close(batch.stored.text, found.text, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.stored.image, found.image, atol=1e-5, rtol=0)


def test_a_check_recomputes_every_caption(recipe: Recipe, store: Path) -> None:
    checked = job(recipe, store).check()
    assert checked.worst_cosine > 0.9999
    assert job(recipe, store).embed() == Store.open(store).manifest  # complete: nothing is done


def test_a_run_from_the_store_learns_what_one_learns_whose_rows_are_all_missing(
    recipe_file: Path, sets: tuple[str, ...], store: Path, tmp_path: Path
) -> None:
    out = {}
    for name, miss in (("stored", "fail"), ("missing", "teacher")):
        folder = store
        if name == "missing":  # the live teacher is shown the captions that the store's views have
            folder = tmp_path / "empty"
            (folder / "parts").mkdir(parents=True)
            (folder / "manifest.json").write_bytes((store / "manifest.json").read_bytes())
        run = train(recipe_file, "--out", tmp_path / name, sets=(*sets, f"teacher.store={folder}", f"teacher.store_miss={miss}"))
        assert run.code == 0, run.err
        out[name] = rows(tmp_path / name)
    for one, other in zip(out["stored"], out["missing"], strict=True):
        assert one["losses"] == pytest.approx(other["losses"], abs=1e-5)
        assert one["captions"] == other["captions"]
        assert one["captions"]["txt"] + one["captions"]["json:more"] == pytest.approx(1)
    assert any(0 < row["captions"]["json:more"] < 1 for row in out["stored"])
    assert any(row["captions"]["lacking"] > 0 for row in out["stored"])


def test_texts_alone_from_a_store_are_those_of_the_captions_that_a_run_without_one_draws(
    recipe_file: Path, sets: tuple[str, ...], store: Path, tmp_path: Path
) -> None:
    texts = (f"teacher.store={store}", "teacher.store_of=text", "teacher.store_miss=fail")
    found = []
    for name, more in (("live", ()), ("texts", texts)):
        run = train(recipe_file, "--out", tmp_path / name, sets=(*sets, *more))
        assert run.code == 0, run.err
        found.append(rows(tmp_path / name))
    for live, stored in zip(*found, strict=True):
        assert stored["losses"] == pytest.approx(live["losses"], abs=1e-5)
        assert stored["captions"] == live["captions"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (['data.captions={ txt = 0.75, "json:more" = 0.25 }'], "data.captions.txt: 0.5 in the store, 0.75 in the recipe"),
        (['data.captions={ txt = 1, "json:other" = 1 }'], "data.captions.json:other: None in the store, 0.5 in the recipe"),
        (["data.captions={ txt = 1 }"], "data.caption: None in the store, 'txt' in the recipe"),
        (["data.clean=['lower']"], r"data.clean: None in the store, \['lower'\] in the recipe"),
    ],
)
def test_a_store_of_another_caption_policy_is_refused_with_the_difference(
    recipe_file: Path, sets: tuple[str, ...], store: Path, changes: list[str], said: str
) -> None:
    other = recipes.load(str(recipe_file), [one for one in sets if one != CAPTIONS or changes[0].startswith("data.clean")] + changes)[0]
    assert other.teacher is not None
    shards = ShardSet.open(other.data, 0, 1, no_barrier)
    assert shards.captions == CaptionPolicy.of(other.data)
    with pytest.raises(StoreError, match=said):
        open_store(store, other, clip.resolve(other.teacher, "teacher"), shards, ALONE)
    if "other" not in changes[0]:
        with pytest.raises(StoreError, match=said):
            job(other, store).embed()


def test_the_dry_run_tells_the_sources_and_finds_a_field_that_is_nowhere(recipe_file: Path, sets: tuple[str, ...], tmp_path: Path) -> None:
    told = train(recipe_file, "--dry_run", "--out", tmp_path / "a", sets=(*sets, "data.clean=['urls']"))
    assert told.code == 0, told.err
    assert "captions: 0.5 json:more, 0.5 txt; of 40 samples looked at these have captions: json:more 26 with 39, txt 40" in told.out
    assert "captions: cleaned by urls (data.clean)" in told.out
    refused = train(recipe_file, "--dry_run", "--out", tmp_path / "b", sets=(*sets, 'data.captions={ txt = 1, "json:mor" = 1 }'))
    assert refused.code == 2
    assert "data.captions: 'json:mor': none of 40 .json members" in refused.err
    assert "did you mean 'json:more'?" in refused.err


def test_another_policy_is_another_run(recipe_file: Path, sets: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = train(recipe_file, "--out", out, sets=(*sets, "teacher.mode=replicated", "optim.steps=3"))
    assert first.code == 0, first.err
    assert losses(out)
    again = train(
        recipe_file,
        "--out",
        out,
        sets=(*sets, "teacher.mode=replicated", "optim.steps=3", 'data.captions={ txt = 0.75, "json:more" = 0.25 }'),
    )
    assert again.code == 2
    assert "data.captions.txt: 0.5 -> 0.75" in again.err
