"""From `[student]` to the sources of its weights: what each key names, found without reading a weight."""

from __future__ import annotations

from pathlib import Path

import timm
from open_clip import list_pretrained_tags_by_model

from megakd.models import clip, pretrained
from megakd.models.clip import ModelSpec
from megakd.models.image_only import SAVED_ONCE
from megakd.models.matching import errors_of
from megakd.models.preprocessing import KEYS, complete
from megakd.models.start.donor import Donor, TeachersText
from megakd.models.start.files import FileTower
from megakd.models.start.inherit import Inherited
from megakd.models.start.libraries import TimmTower, TransformersTower
from megakd.models.start.parts import Source, Tower
from megakd.models.start.plan import Start
from megakd.models.weight_kinds import recognise
from megakd.recipe import Model, Preprocess, Recipe, Student, chain
from megakd.recipe.start import TEACHER

OWN = {"image": "timm", "text": "transformers"}  # the word for the weights of the library that a tower is built by


def start_of(recipe: Recipe, student: ModelSpec) -> Start:
    """What the recipe's student begins with. Raises ValueError, naming the key, value and remedy, for what cannot be that."""
    settings = recipe.student
    assert settings is not None
    sources: list[Source] = []
    if settings.image_weights is not None:
        sources.append(_tower(settings.image_weights, "image", settings, student))
    if settings.text_weights is not None:
        sources.append(_tower(settings.text_weights, "text", settings, student))
    if settings.text_from is not None:
        sources.append(TeachersText(_teacher(recipe, "student.text_from = 'teacher'")))
    if settings.inherit is not None:
        sources.append(_inherited(recipe, student))
    return Start(student, sources)


def _teacher(recipe: Recipe, key: str) -> Donor:
    """The recipe's teacher, also one that another recipe is about to train: its architecture is then that recipe's student's."""
    teacher = recipe.teacher
    assert teacher is not None, "checked by the recipe"
    described: Model = chain.model(teacher, "teacher")
    role = "teacher" if described.model == teacher.model else f"teacher.recipe = {teacher.recipe!r}: student"
    return Donor(key, teacher, clip.resolve(described, role))


def _inherited(recipe: Recipe, student: ModelSpec) -> Inherited:
    assert recipe.student is not None
    inherit = recipe.student.inherit
    assert inherit is not None
    if inherit.model == TEACHER:
        donor = _teacher(recipe, "student.inherit.model = 'teacher'")
    else:
        named = Model(model=inherit.model, architecture=inherit.architecture, pretrained=inherit.pretrained)
        if inherit.architecture is not None:
            named = named.model_copy(update={"tokenizer": recipe.student.tokenizer})
        if pretrained.is_file(inherit.pretrained):  # which does not say how its images were prepared
            own = complete(student.preprocess, student.config)
            named = named.model_copy(update={"preprocess": Preprocess(**{key: getattr(own, key) for key in KEYS})})
        donor = Donor("student.inherit", named, clip.resolve(named, "student.inherit"))
    towers: dict[str, tuple[Tower, ...]] = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}
    return Inherited(donor, towers[inherit.towers], inherit.layers, inherit.widths)


def _tower(value: str, tower: Tower, settings: Student, student: ModelSpec) -> Source:
    key = f"student.{tower}_weights"
    said, name = f"{key} = {value!r}", student.config["vision_cfg" if tower == "image" else "text_cfg"].get(_NAMES[tower])
    if value == OWN[tower]:
        return _of_library(said, tower, name)
    if pretrained.is_file(value):
        with errors_of(said):
            recognise(Path(value))
        return FileTower(said, tower, Model(architecture={}, pretrained=value))
    known = list[str]()
    if settings.model is not None and ":" not in settings.model:
        tagged = Model(model=settings.model, pretrained=value)
        if pretrained.tag_of(tagged) is not None:
            pretrained.check_activation(tagged, student.config, "student", key=key)
            return FileTower(said, tower, tagged)
        known += list_pretrained_tags_by_model(pretrained.open_clip_name(settings.model))
    if tower == "image" and name:
        tags = [one.partition(".")[2] for one in timm.list_pretrained(name.partition(".")[0])]
        if value in tags:
            return _of_library(said, tower, f"{name.partition('.')[0]}.{value}")
        known += tags
    raise ValueError(
        f"{said}: neither {OWN[tower]!r}, a file ({', '.join(pretrained.WEIGHT_SUFFIXES)}) nor a tag of this tower; tags: "
        f"{', '.join(known) or 'none'}"
    )


_NAMES = {"image": "timm_model_name", "text": "hf_model_name"}


def _of_library(said: str, tower: Tower, name: str | None) -> Source:
    """name: of the library's model, as the student's configuration has it, or with the tag that is asked for."""
    if name is None:
        section = "vision_cfg.timm_model_name" if tower == "image" else "text_cfg.hf_model_name"
        raise ValueError(f"{said}: the {tower} tower is open_clip's own, without {section}; give a file, or a tag of its model")
    if tower == "text":
        return TransformersTower(said, name)
    cfg = timm.get_pretrained_cfg(name)
    settings = Model(model=f"{pretrained.TIMM}{name.partition('.')[0]}", pretrained=None if cfg is None else cfg.tag)
    if pretrained.tag_of(settings) is None:
        raise ValueError(f"{said}: timm has no weights of {name} in its repositories of the hub: {SAVED_ONCE}")
    return TimmTower(said, settings)
