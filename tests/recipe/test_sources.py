"""Sources by name in a recipe: what is read, refused in one message, and compared by a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from megakd.recipe.sources import PairSource

TWO = "data.train={ a = { shards = 'a.tar', weight = 2 }, b = { shards = ['b.tar', 'c.tar'], weight = 1 } }"


def loaded(recipe_file: Path, *overrides: str) -> Recipe:
    return recipes.load(str(recipe_file), overrides)[0]


def test_a_table_keeps_its_order_and_its_weights(recipe_file: Path) -> None:
    train = loaded(recipe_file, TWO, "data.train.b.weight=0.5").data.train
    assert train == {"a": PairSource(shards="a.tar", weight=2.0), "b": PairSource(shards=["b.tar", "c.tar"], weight=0.5)}
    assert loaded(recipe_file, "data.train=['a.tar', 'b.tar']").data.train == ["a.tar", "b.tar"]


def test_run_json_gives_the_table_back(recipe_file: Path) -> None:
    recipe = loaded(recipe_file, TWO)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("data.train={}", r"^  data\.train: an empty table: name one source at least, as \[data\.train\.NAME\] with shards$"),
        ("data.train.a={ weight = 1 }", r"^  data\.train\.a\.shards: missing"),
        ("data.train.a={ shards = '' }", r"^  data\.train\.a\.shards.* = '': "),
        ("data.train.a={ shards = 'x', weight = -1 }", r"^  data\.train\.a\.weight = -1: Input should be greater than or equal to 0"),
        ("data.train.a={ shards = 'x', wieght = 1 }", r"^  data\.train\.a\.wieght: unknown key; did you mean 'data\.train\.a\.weight'"),
        ("data.train={ 'a b' = { shards = 'x' } }", r"^  data\.train\.a b\.\[key\] = 'a b': "),
        ("data.train={ shards = 'x' }", r"^  data\.train: 'shards' is no table: each source is one, \[data\.train\.NAME\]"),
        (TWO.replace("2", "0").replace("1", "0.0"), r"^  data\.train: the weights of a, b sum to 0"),
        (TWO.replace(", weight = 1", ""), r"^  data\.train: a\.weight is given and b\.weight is not"),
        ("data.train=5", r"^  data\.train = 5: give patterns of shards, as text or a list, or a table of sources"),
        ("data.train=['x', 5]", r"^  data\.train = \['x', 5\]: give patterns of shards, as text or a list, or a table of sources"),
    ],
)
def test_what_makes_no_sense_is_one_line_with_key_and_remedy(recipe_file: Path, tmp_path: Path, given: str, said: str) -> None:
    text = recipe_file.read_text().replace('train = "', '# train = "')
    (tmp_path / "bare.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"(?m){said}") as caught:
        recipes.load(str(tmp_path / "bare.toml"), [given])
    assert len(str(caught.value).splitlines()) == 2 if "shards = ''" not in given else True


def test_two_sources_of_one_name_are_tomls_to_refuse(recipe_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "twice.toml"
    path.write_text(recipe_file.read_text() + "\n[answers.train.a]\nformat = 'llava'\n[answers.train.a]\nformat = 'llava'\n")
    with pytest.raises(ValueError, match="not valid TOML"):
        recipes.load(str(path), [])


def test_question_sources_are_weighed_all_or_none(recipe_file: Path) -> None:
    decoder = ("decoder.model=some", "answers.train.a={ format = 'llava', questions = 'a.json', weight = 2 }")
    with pytest.raises(ValueError, match=r"answers\.train: a\.weight is given and b\.weight is not"):
        loaded(recipe_file, *decoder, "answers.train.b={ format = 'llava', questions = 'b.json' }")
    with pytest.raises(ValueError, match=r"evaluation\.vqa\.a\.weight: unknown key"):
        loaded(recipe_file, *decoder, "evaluation.vqa.a={ format = 'llava', questions = 'a.json', weight = 2 }")
    recipe = loaded(recipe_file, *decoder)
    assert recipe.answers is not None
    assert recipe.answers.train["a"].weight == 2


def test_a_run_goes_on_with_other_paths_and_not_with_other_weights_or_sources(recipe_file: Path) -> None:
    before = loaded(recipe_file, TWO)
    moved = loaded(recipe_file, TWO, "data.train.a.shards=/mnt/a.tar")
    assert recipes.refused(before, moved) == []
    assert recipes.told(before, moved)[0].startswith("data.train.a.shards: 'a.tar' -> '/mnt/a.tar': it has to hold the same data")
    assert recipes.refused(before, loaded(recipe_file, TWO, "data.train.a.weight=3")) == ["data.train.a.weight: 2.0 -> 3.0"]
    for other in (("data.train=a.tar",), (TWO.replace("b =", "c ="),), (TWO, "data.train.c={ shards = 'x', weight = 1 }")):
        assert recipes.refused(before, loaded(recipe_file, *other))[0].startswith("data.train: sources a, b -> ")


def test_sources_are_set_one_by_one_in_the_place_of_shards() -> None:
    given = ["data.train.clean.shards=a/*.tar", "data.train.clean.weight=2", "data.train.noisy={ shards = 'b/*.tar', weight = 1 }"]
    assert recipes.load("smoke", given)[0].data.train == recipes.load("smoke", ["data.train={ clean = { shards = 'a/*.tar', weight = 2 }, "
        "noisy = { shards = 'b/*.tar', weight = 1 } }"])[0].data.train  # fmt: skip
    with pytest.raises(ValueError, match="'steps' is a value, not a section"):
        recipes.load("smoke", ["optim.steps.more=3"])
    with pytest.raises(ValueError, match="'kernels' is a value, not a section"):
        recipes.load("smoke", ["kernels=3", "kernels.ring.more=true"])
