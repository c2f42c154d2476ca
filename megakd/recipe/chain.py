"""Models that another recipe is about to train: their source by that recipe, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from megakd.recipe import AnswerTeacher, Decoder, Model, Recipe, Student
from megakd.recipe import load as recipes

M = TypeVar("M", bound=Model)
CLIP_CONFIG = "open_clip_config.json"  # open_clip's name for a model's description in its folder
LANGUAGE = "/bundle/language"  # of a run that trains or makes a language model


def model(settings: M, role: str) -> M:
    """`settings`, with the source of the student that its recipe trains while the folder of `model` is not there.

    Raises ValueError when that recipe trains no student.
    """
    folder = Path((settings.model or "").removeprefix("local-dir:"))
    if settings.recipe is None or (folder / CLIP_CONFIG).is_file():
        return settings
    first = with_text(recipes.load(settings.recipe)[0])
    if first is None:
        raise ValueError(f"{role}.recipe = {settings.recipe!r}: has no [student], and so trains no {role}: name another recipe")
    trained = model(first, "student")
    source = {name: getattr(trained, name) for name in ("model", "architecture", "pretrained", "recipe")}
    kept = {name: getattr(settings, name) or getattr(trained, name) for name in ("tokenizer", "preprocess", "image_size")}
    return settings.model_copy(update={**source, **kept}).having_text_of(trained.text_of)


def with_text(recipe: Recipe) -> Student | None:
    """The recipe's student, which knows by its `text_of` the teacher whose text tower it has. Raises ValueError as `model` does."""
    if recipe.student is None or recipe.student.text_from is None or recipe.teacher is None:
        return recipe.student
    return recipe.student.having_text_of(model(recipe.teacher, "teacher"))


def decoder(settings: Decoder) -> Decoder:
    """`settings`, with the source of the language model that earlier recipes start from while its folder is not there.

    Raises ValueError when the recipe that should train it has no decoder.
    """
    name = settings.model or ""
    if settings.recipe is None or not name.endswith(LANGUAGE) or (Path(name) / "config.json").is_file():
        return settings
    earlier = decoder(before(settings))
    source = {"model": earlier.model, "architecture": earlier.architecture, "tokenizer": settings.tokenizer or earlier.tokenizer}
    # an architecture has no weights that could be quantised
    return settings.model_copy(update={**source, "quantise": "none" if earlier.model is None else settings.quantise})


def before(settings: Decoder | AnswerTeacher, key: str = "decoder") -> Decoder:
    """`[decoder]` of the recipe that `settings`, the section `key`, name. Raises ValueError when it has none."""
    assert settings.recipe is not None
    first = recipes.load(settings.recipe)[0].decoder
    if first is None:
        raise ValueError(f"{key}.recipe = {settings.recipe!r}: has no [decoder], and so trains none: name another recipe")
    return first
