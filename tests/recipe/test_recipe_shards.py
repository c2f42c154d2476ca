"""What a recipe may say of teachers whose embeddings lie in the shards; each mistake has one message with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.recipe import load as recipes
from megakd.recipe import resume
from megakd.recipe.load import refused, told

TINY = 'name = "dr"\n[data]\ntrain = "{0..3}.tar"\n[student]\nmodel = "ViT-B-32"\n[optim]\nsteps = 9\nbatch = 8\nlr = 1e-3\n'
ONE = ("teacher.model=ViT-L-14-quickgelu", "teacher.pretrained=openai", "teacher.scale=100", "teacher.store=data.train")
BOTH = (*ONE, "ensemble.b.model=ViT-L-14", "ensemble.b.pretrained=openai", "ensemble.b.scale=100", "ensemble.b.store=data.train")
LEARNED = ("objectives.contrastive=0", "objectives.similarity=1")


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    return str(tmp_path / "tiny.toml")


def test_both_teachers_of_one_store_are_a_recipe(tiny: str) -> None:
    recipe = recipes.load(tiny, (*LEARNED, *BOTH, 'data.captions={ txt = 0.5, "syn.json:syn_text" = 0.5 }'))[0]
    assert {role: teacher.store for role, teacher in recipe.teachers().items()} == {"teacher": "data.train", "ensemble.b": "data.train"}
    assert recipes.load(tiny, (*LEARNED, *ONE, "views.seed=7"))[0].views.seed == 7


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("ensemble.b.store=folder",), r"a store replays one teacher's augmentations"),
        (("ensemble.b.store_of=text",), r"ensemble\.b\.store_of = 'text' beside teacher\.store .*all teachers read the shards alike"),
        (("teacher.store_miss=fail",), r"store_miss = 'fail': .*counted and replaced; take it out"),
        (("teacher.text_padding=longest",), r"text_padding = 'longest': with store = 'data.train' .*reads nothing; take it out"),
        (("teacher.patch_grid=[2, 2]",), r"patch_grid = \[2, 2\]: .*embeddings alone"),
        (("objectives.sigmoid_similarity=1",), r"objectives\.sigmoid_similarity: needs the teacher's logit bias"),
        (('data.clean=["lower"]',), r"data\.clean = \['lower'\]: .*take it out"),
        (("views.flip=0.0",), r"views\.flip: .*the shards' own augmentations are replayed; take it out"),
        (("data.decode=scaled",), r"data\.decode = 'scaled': .*decoded in full and resized by Pillow; take it out"),
        (("data.resampling=torch",), r"data\.resampling = 'torch': .*take it out"),
        (("views.preset=mobileclip",), r"views\.(crop_scale|flip): .*replayed; take it out"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny: str, sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.load(tiny, (*LEARNED, *BOTH, *sets))


def test_a_scale_is_asked_for_where_an_objective_reads_it(tiny: str) -> None:
    without = tuple(one for one in BOTH if not one.startswith("ensemble.b.scale"))
    with pytest.raises(ValueError, match=r"ensemble\.b\.scale: missing; .*the shards hold no logit scale"):
        recipes.load(tiny, (*LEARNED, *without))
    no_scales = tuple(one for one in BOTH if ".scale=" not in one)
    recipes.load(tiny, ("objectives.contrastive=0", "objectives.feature=1", *no_scales))


def test_texts_alone_are_freshly_augmented(tiny: str) -> None:
    texts = ("teacher.store_of=text", "ensemble.b.store_of=text", "views.flip=0.0", "data.resampling=torch")
    assert recipes.load(tiny, (*LEARNED, *BOTH, *texts))[0].views.flip == 0


def test_a_resumed_run_keeps_to_the_shards_embeddings(tiny: str) -> None:
    assert resume.change("teacher.store") == "told"
    live, read = (recipes.load(tiny, (*LEARNED, *sets))[0] for sets in (ONE[:3], ONE))
    folder, other = (recipes.load(tiny, (*LEARNED, *ONE[:3], f"teacher.store={name}"))[0] for name in ("a", "b"))
    assert refused(live, read) == ["teacher.store: None -> 'data.train' (other augmentations, and embeddings of another origin)"]
    assert refused(read, folder) != []
    assert refused(folder, other) == []
    assert told(folder, other) != []


def test_a_resumed_run_keeps_the_teachers_order(tiny: str) -> None:
    third = tuple(one.replace("ensemble.b", "ensemble.c") for one in BOTH if one.startswith("ensemble.b"))
    first = recipes.load(tiny, (*LEARNED, *BOTH, *third))[0]
    other = first.model_copy(update={"ensemble": dict(reversed(first.ensemble.items()))})
    assert refused(first, other) == ["the order of [ensemble]: ['b', 'c'] -> ['c', 'b'], by which each teacher has its part of a row"]
