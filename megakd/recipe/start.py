"""Where a student's weights come from, beside `pretrained`: by tower, from the teacher, or chosen from a larger model's."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megakd.recipe.section import Section

TEACHER = "teacher"
BRING_THEIR_OWN = ("local-dir:", "hf-hub:")  # how the names of models begin whose weights come with them


class Inherit(Section):
    """A model of the student's kind, as deep and as wide at least, some of whose layers, heads, channels and widths the student begins
    with, as TinyCLIP's weight inheritance does (arXiv 2309.12314)."""

    model: str | None = Field(
        None, description="whose weights: teacher (the recipe's), an open_clip name with pretrained, hf-hub:ORG/NAME, local-dir:FOLDER"
    )
    architecture: dict[str, Any] | None = Field(
        None, description="in the place of model: an open_clip model configuration, with the student's tokenizer"
    )
    pretrained: str | None = Field(None, description="its weights: open_clip's tag, or a .safetensors/.pt file")
    towers: Literal["both", "image", "text"] = Field("both", description="of the student that inherit; logit scale and bias with both")
    layers: Literal["even", "first"] = Field("even", description="even: spread from the first to the last; first: the first ones")
    widths: Literal["first", "magnitude"] = Field(
        "first",
        description="which dimensions, heads and MLP channels, where the student has fewer: the first, or those whose weights have the "
        "largest mean square",
    )

    @model_validator(mode="after")
    def _names_weights(self) -> Inherit:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give either `model` (a name, or 'teacher') or `architecture` (a table), not both and not neither")
        brings_own = self.model == TEACHER or (self.model or "").startswith(BRING_THEIR_OWN)
        if brings_own and self.pretrained is not None:
            raise ValueError(f"pretrained = {self.pretrained!r}: model = {self.model!r} brings its own weights; take one of the two out")
        if not brings_own and self.pretrained in (None, "random"):
            raise ValueError(
                f"pretrained = {self.pretrained!r}: there is nothing to inherit without weights; give open_clip's tag, or a file"
            )
        return self


class Start(Section):
    """Keys of `[student]` about the weights that its towers begin with; what none of them gives is drawn from the seed."""

    image_weights: str | None = Field(
        None,
        description="of the image tower: timm (timm's own, of vision_cfg.timm_model_name), a tag of timm's or of open_clip's model, or a "
        ".safetensors/.pt file with a CLIP model, the tower alone, or timm's model",
    )
    text_weights: str | None = Field(
        None,
        description="of the text tower: transformers (those of text_cfg.hf_model_name), a tag of open_clip's model, or a .safetensors/.pt "
        "file with a CLIP model, or the tower alone",
    )
    text_from: Literal["teacher"] | None = Field(
        None, description="teacher: its text tower, weights and embed_dim included, and its tokenizer in the place of the student's"
    )
    inherit: Inherit | None = Field(None, description="a larger model that it begins with a part of")


def check(start: Start, model: str | None, pretrained: str | None, tokenizer: str | None, recipe: str | None) -> None:
    """model, pretrained, tokenizer, recipe: of the same student. Raises ValueError where two keys give the weights of one tower."""
    given = [key for key in Start.model_fields if getattr(start, key) is not None]
    if not given:
        return
    key = given[0]
    if pretrained not in (None, "random"):
        whose = "the weights of both towers"
        remedy = f"set {key} to it, and take pretrained out" if key.endswith("_weights") else f"take it or {key} out"
        raise ValueError(f"pretrained = {pretrained!r}: gives {whose}, and {key} others; {remedy}")
    if recipe is not None:
        raise ValueError(f"recipe = {recipe!r}: trains the weights that this student begins with, and {key} gives others; take one out")
    if (model or "").startswith(BRING_THEIR_OWN) and pretrained is None:
        raise ValueError(
            f"model = {model!r}: brings its own weights, and {key} gives others; set pretrained = 'random' to take its architecture alone, "
            f"or take {key} out"
        )
    if start.text_from is not None and tokenizer is not None:
        raise ValueError(f"tokenizer = {tokenizer!r}: text_from takes the teacher's tokenizer with its text tower; take tokenizer out")
    inherits = "none" if start.inherit is None else start.inherit.towers
    of_text = [key for key in ("text_weights", "text_from") if key in given]
    if len(of_text) == 2:
        raise ValueError("text_weights and text_from both give the text tower's weights; take one of them out")
    if of_text and inherits in ("both", "text"):
        raise ValueError(f"inherit.towers = {inherits!r}: {of_text[0]} gives the text tower's weights; set inherit.towers to 'image'")
    if "image_weights" in given and inherits in ("both", "image"):
        raise ValueError(f"inherit.towers = {inherits!r}: image_weights gives the image tower's; set inherit.towers to 'text'")


def check_teacher(start: Start, teacher: str | None, pretrained: str | None, *, there: bool) -> None:
    """teacher, pretrained: of the recipe's [teacher], if it is there. Raises ValueError where it has not what `start` takes from it."""
    for key, tower in {"text_from": start.text_from, "inherit.model": None if start.inherit is None else start.inherit.model}.items():
        if tower != TEACHER:
            continue
        named = f"student.{key} = 'teacher'"
        if not there:
            raise ValueError(f"{named}: there is no [teacher]; give the recipe one, or take {key} out")
        if pretrained == "random":
            raise ValueError(f"{named}: teacher.pretrained = 'random' has no weights to take; give it trained ones, or take {key} out")
        if key == "text_from" and (teacher or "").startswith(("timm:", "transformers:")):
            raise ValueError(f"{named}: {teacher} sees images alone and has no text tower; name a CLIP as [teacher], or take text_from out")
