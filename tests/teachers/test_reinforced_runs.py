"""Runs on shards that hold the embeddings of two teachers: the losses of the live ones on the same views, and a check that finds others."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from megakd.data.shards import ShardSet
from megakd.data.transforms import TowerView, normalise
from megakd.models import clip
from megakd.models.fingerprint import preprocessing
from megakd.planning import plan as planner
from megakd.planning.cluster import Cluster
from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from megakd.runtime.launch import World
from megakd.teachers import build, embed
from megakd.teachers.embed_request import EmbedRequest
from support.reinforced import VIEWS, Embed, Form, Written, packed, write_reinforced
from support.runs import TRAIN, Finished, losses, rows, run_ranks, settings, train
from support.shards import data, no_barrier

ALONE = World(0, 1, torch.device("cpu"))
SIZE, PAIRS = 48, 40


def _teacher(key: str, width: int, scale: float, tower: int) -> tuple[str, ...]:
    vision = f"{{ image_size = {SIZE}, patch_size = 16, width = {tower}, layers = 1, head_width = 16 }}"
    text = "{ context_length = 24, width = 32, heads = 2, layers = 1 }"
    architecture = f"{{ embed_dim = {width}, vision_cfg = {vision}, text_cfg = {text} }}"
    return f"{key}.architecture={architecture}", f"{key}.pretrained=random", f"{key}.scale={scale}"


BOTH = (*_teacher("teacher", 24, 20.0, 64), *_teacher("ensemble.second", 16, 15.0, 32))
READ = ("teacher.store=data.train", "ensemble.second.store=data.train")
LEARNED = (
    "objectives.contrastive=0.0", "objectives.similarity=1.0", "objectives.feature=0.5", "optim.steps=4", "optim.warmup=0",
    'data.captions={ txt = 0.5, "syn.json:syn_text" = 0.5 }',
)  # fmt: skip


def embedder(recipe: Recipe, world: Path) -> Embed:
    """All teachers, as the recipe has them, live."""
    shards = ShardSet.open(data(f"{world}/train/*.tar"), 0, 1, no_barrier)
    models = [clip.resolve(settings, role) for role, settings in recipe.teachers().items()]
    teachers = [build.live_teacher(recipe, model, ALONE, shards, piece=8) for model in models]
    views = [TowerView(preprocessing(model), model.tokenize) for model in models]

    def embed_all(pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        pairs = list(zip(teachers, views, strict=True))
        images = [teacher.embed_images(normalise(pixels, view.preprocess, teacher.dtype)) for teacher, view in pairs]
        return torch.cat(images, 1), torch.cat([teacher.embed_texts(view.tokenize(texts).long()) for teacher, view in pairs], 1)

    return embed_all


@pytest.fixture(scope="module")
def made(recipe_file: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """Shards of some of the world's pairs, with the rows of these teachers."""
    shards = ShardSet.open(data(f"{world}/train/*.tar"), 0, 1, no_barrier)
    read = [shards.read(index, ("image", "caption")).members for index in range(PAIRS)]
    pairs = [(one["image"], one["caption"].decode()) for one in read]

    def write(form: Form = "npz", sets: tuple[str, ...] = BOTH, **more) -> Written:
        live = embedder(recipes.load(str(recipe_file), (*sets, *LEARNED))[0], world)
        return write_reinforced(tmp_path_factory.mktemp("shards"), pairs, live, SIZE, form=form, **more)

    return write


@pytest.fixture(scope="module")
def whole(made) -> Written:
    return made()


def go(recipe_file: Path, out: Path, written: Written, *more: str, dry: bool = False) -> Finished:
    sets = (*BOTH, *LEARNED, *READ, f"data.train={written.pattern}", *more)
    return train(recipe_file, "--out", out, *(["--dry_run"] if dry else []), sets=sets)


def test_a_run_has_the_losses_of_the_live_teachers_on_the_replayed_views(
    recipe_file: Path, whole: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = go(recipe_file, tmp_path / "stored", whole)
    assert stored.code == 0, stored.err
    assert "teacher columns 0 to 23, ensemble.second columns 24 to 39" in stored.out
    assert "each has 3 augmentations and 3 captions (.npz)" in stored.out
    with monkeypatch.context() as patch:  # the loader replays, and the teachers are asked
        ask = build.live_teacher
        patch.setattr(build, "stored_teacher", lambda _, recipe, model, shards, world, **more: ask(recipe, model, world, shards, **more))
        asked = go(recipe_file, tmp_path / "live", whole)
    assert asked.code == 0, asked.err
    for row, expected in zip(rows(tmp_path / "stored"), rows(tmp_path / "live"), strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    refused = train(recipe_file, "--out", tmp_path / "stored", sets=(*BOTH, *LEARNED, f"data.train={whole.pattern}"))
    assert refused.code == 2
    assert "teacher.store: 'data.train' -> None (other augmentations, and embeddings of another origin)" in refused.err


def test_no_weight_is_read(recipe_file: Path, whole: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a teacher was built")

    monkeypatch.setattr("megakd.teachers.replicated.ReplicatedTeacher.load", refuse)
    finished = go(recipe_file, tmp_path / "run", whole, "optim.steps=1")
    assert finished.code == 0, finished.err
    live_images = ("teacher.store_of=text", "ensemble.second.store_of=text")
    with pytest.raises(AssertionError, match="a teacher was built"):  # as it is where images are its own to see
        go(recipe_file, tmp_path / "live", whole, "optim.steps=1", *live_images)


def test_bf16_members_have_the_losses_within_rounding_and_texts_alone_leave_images_live(
    recipe_file: Path, made, whole: Written, tmp_path: Path
) -> None:
    bf16 = made("bf16")
    for name, written in (("exact", whole), ("bf16", bf16)):
        assert go(recipe_file, tmp_path / name, written, "optim.steps=2").code == 0
    first, second = (rows(tmp_path / name)[0]["losses"] for name in ("exact", "bf16"))
    assert second == pytest.approx(first, rel=1e-2)
    assert second != first
    texts = go(recipe_file, tmp_path / "texts", bf16, "optim.steps=2", "teacher.store_of=text", "ensemble.second.store_of=text")
    assert texts.code == 0, texts.err
    assert losses(tmp_path / "texts") != losses(tmp_path / "bf16")


def check(recipe_file: Path, written: Written, *more: str) -> None:
    request = EmbedRequest(Path("data.train"), samples=24)
    sets = [*BOTH, *LEARNED, *READ, f"data.train={written.pattern}", *more]
    embed.run(str(recipe_file), request, check=True, overrides=sets)


def test_a_check_finds_the_teachers_and_says_how_near_they_are(recipe_file: Path, whole: Written, capsys) -> None:
    check(recipe_file, whole)
    told = capsys.readouterr().out
    assert "teacher (own architecture random), columns 0 to 23: 24 images: cosine mean 1.000000, worst 1.000000; from the mean row" in told
    assert "72 captions: cosine mean 1.000000" in told
    assert "ensemble.second (own architecture random), columns 24 to 39" in told


def test_a_check_finds_other_augmentations_of_the_same_images(recipe_file: Path, made, capsys) -> None:
    def moved(_: int, own: dict[str, bytes]) -> dict[str, bytes]:
        listed = json.loads(own["paug.json"])["param_aug"]
        views = json.loads(listed) if isinstance(listed, str) else listed
        return {**own, "paug.json": json.dumps({"param_aug": [views[-1], *views[:-1]]}).encode()}

    with pytest.raises(ValueError, match=r"of the images of teacher, .*Captions agree, so it is the images"):
        check(recipe_file, made(change=moved))


def test_a_check_fails_with_what_it_likely_is(recipe_file: Path, made, whole: Written) -> None:
    def other_rows(number: int, own: dict[str, bytes]) -> dict[str, bytes]:
        parts = torch.randn((VIEWS, 40), generator=torch.Generator().manual_seed(number)).split([24, 16], 1)
        return {**own, **packed(torch.cat([torch.nn.functional.normalize(part) for part in parts], 1), whole.rows[number])}

    with pytest.raises(ValueError, match=r"100.0% of the images of teacher, .*Captions agree, so it is the images"):
        check(recipe_file, made(change=other_rows))

    def other_captions(number: int, own: dict[str, bytes]) -> dict[str, bytes]:
        return {**own, "txt": b"something else", "syn.json": json.dumps({"syn_text": ["of another", "picture"]}).encode()}

    with pytest.raises(ValueError, match="Images agree, so it is the captions"):
        check(recipe_file, made(change=other_captions))
    with pytest.raises(ValueError, match=r"The others agree, so it is ensemble.second: other weights"):
        check(recipe_file, whole, "ensemble.second.architecture.vision_cfg.head_width=32")


def test_a_check_finds_teachers_of_one_width_in_the_wrong_order(recipe_file: Path, made) -> None:
    alike = (*_teacher("teacher", 24, 20.0, 64), *_teacher("ensemble.second", 24, 15.0, 32))
    swapped = (*_teacher("teacher", 24, 20.0, 32), *_teacher("ensemble.second", 24, 15.0, 64))
    written = made(sets=alike)
    check(recipe_file, written, *alike)
    with pytest.raises(ValueError, match=r"teacher is the teacher whose columns ensemble\.second reads: exchange the two in the recipe"):
        check(recipe_file, written, *swapped)


def test_a_plan_counts_no_teacher(recipe_file: Path) -> None:
    recipe = recipes.load(str(recipe_file), (*BOTH, *LEARNED, *READ))[0]
    assert planner.plan(recipe, "test", None, Cluster(2, 80)).asked == "store"
    texts = recipes.load(str(recipe_file), (*BOTH, *LEARNED, *READ, "teacher.store_of=text", "ensemble.second.store_of=text"))[0]
    assert planner.plan(texts, "test", None, Cluster(2, 80)).asked == "replicated bf16, text from store"


def test_a_run_of_two_ranks_is_that_of_one(recipe_file: Path, whole: Written, tmp_path: Path) -> None:
    assert go(recipe_file, tmp_path / "one", whole, "optim.steps=2").code == 0
    sets = (*BOTH, *LEARNED, *READ, f"data.train={whole.pattern}", "optim.steps=2")
    run_ranks(TRAIN, "--recipe", recipe_file, "--out", tmp_path / "two", *settings(*sets))
    for row, expected in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=1e-4)


def test_the_store_is_not_written(recipe_file: Path, whole: Written) -> None:
    sets = [*BOTH, *LEARNED, *READ, f"data.train={whole.pattern}"]
    with pytest.raises(ValueError, match=r"--out data\.train: the embeddings of these shards are in them"):
        embed.run(str(recipe_file), EmbedRequest(Path("data.train")), check=False, overrides=sets)
    with pytest.raises(ValueError, match=r"which a recipe with teacher\.store = 'data.train' reads"):
        embed.run(str(recipe_file), EmbedRequest(Path("data.train")), check=True, overrides=[*BOTH, *LEARNED])


def test_the_shipped_recipe_reads_such_shards_in_a_dry_run(world: Path, tmp_path: Path) -> None:
    """mobileclip2_s0 with what its comments say, on rows as wide as its two teachers'."""

    def rows_of(pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        parts = [torch.nn.functional.normalize(torch.ones(len(one), 2, 768), dim=2).flatten(1) for one in (pixels, texts)]
        return parts[0], parts[1]

    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "JPEG")
    written = write_reinforced(tmp_path, [(picture.getvalue(), f"red {number}") for number in range(20)], rows_of, 224)
    sets = (
        f"data.train={written.pattern}", "data.workers=0", "optim.batch=8", 'data.captions={ txt = 0.5, "syn.json:syn_text" = 0.5 }',
        "teacher.store=data.train", "ensemble.longer.store=data.train", "views.crop_scale=[0.5, 1.0]",
    )  # fmt: skip
    finished = train("mobileclip2_s0", "--dry_run", "--out", tmp_path / "run", sets=sets)
    assert finished.code == 0, finished.err
    assert "teacher columns 0 to 767, ensemble.longer columns 768 to 1535" in finished.out
    other = (*sets, "teacher.model=ViT-B-32", "teacher.pretrained=random")
    narrow = train("mobileclip2_s0", "--dry_run", "--out", tmp_path / "run", sets=other)
    assert narrow.code == 2
    assert "rows of 1536 numbers, where teacher 512 + ensemble.longer 768 are 1280" in narrow.err
