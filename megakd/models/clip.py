"""A CLIP-style pair of towers from a recipe's `[student]` or `[teacher]`: by open_clip name, hub, folder or own architecture.

`resolve` needs no weights and finds every mistake of the settings in milliseconds; `build` makes the model. Both go through
open_clip's `local-dir:` form for an architecture given in the recipe, so that one code path serves all four sources.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import get_model_config, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg
from torch import nn

from megakd.models import architecture, casts, image_only, preprocessing, pretrained, resolution, text_padding
from megakd.models.int8.migration import Originals
from megakd.models.matching import Match, errors_of
from megakd.models.pretrained import HUB, LOCAL, RANDOM, WEIGHT_SUFFIXES
from megakd.models.tokenizing import Tokenize, tokenizer
from megakd.models.weight_kinds import recognise
from megakd.models.weights import in_memory
from megakd.recipe import Model, texts
from megakd.recipe.chain import CLIP_CONFIG
from megakd.runtime import precision as precisions
from megakd.runtime.precision import Precision

__all__ = ["RANDOM", "ClipModel", "ModelSpec", "Precision", "build", "configuration", "on_meta", "parameters_in", "resolve"]


@dataclass(frozen=True)
class ModelSpec:
    """What is known of a model before its weights are touched."""

    role: str
    settings: Model
    config: dict[str, Any]
    preprocess: dict[str, Any]
    tokenize: Tokenize

    @property
    def width(self) -> int:
        """Width D of the joint embedding."""
        return int(self.config["embed_dim"])

    @property
    def has_bias(self) -> bool:
        """Whether the model adds a learned bias to its logits, as those trained with a sigmoid loss do."""
        return self.config.get("init_logit_bias") is not None

    @property
    def has_text(self) -> bool:
        """Whether it has a text tower: timm's and transformers' models see images alone."""
        return "text_cfg" in self.config

    @property
    def cuts_texts(self) -> bool:
        return self.settings.text_padding != "max_length"

    def padded(self, tokenize: Tokenize) -> Tokenize:
        """`tokenize`, its texts padded as `text_padding` says."""
        return text_padding.ToLongest.of(tokenize, self.config) if self.cuts_texts else tokenize

    @property
    def context_length(self) -> int:
        """Tokens of a text, 0 without a text tower."""
        return int(self.config["text_cfg"].get("context_length", 77)) if self.has_text else 0


@dataclass(frozen=True)
class ClipModel:
    """A built model with what its data needs. `config` and `preprocess` are open_clip's, so `export` can write them back.

    dtype: of the pixels that the model takes. Its parameters do not tell: some of a bf16 model's are float32 (see `casts.to_bf16`).
    originals: the matrices of an int8 model that was read from weights, for whoever wants to read them again.
    """

    clip: nn.Module
    description: ModelSpec
    preprocess: PreprocessCfg
    dtype: torch.dtype = torch.float32
    originals: Originals | None = None


def resolve(settings: Model, role: str) -> ModelSpec:
    """Read the model's configuration and tokenizer. role: "student" or "teacher", for messages.

    Raises ValueError naming the key and the remedy: unknown name, missing folder or file, an architecture that open_clip cannot build,
    weights that were trained with another activation, a tokenizer that does not fit the text tower.
    """
    config, preprocess = configuration(settings, role)
    _check_weights(settings, role)
    if settings.text_padding != "max_length" and (why := text_padding.refused(config)) is not None:
        raise ValueError(f"{role}.text_padding = {settings.text_padding!r}: {why}, so its embeddings would change; take it out")
    tokenize = (
        tokenizer(settings.speaks_as, config, role if settings.text_of is None else "teacher")
        if "text_cfg" in config
        else image_only.no_words
    )
    description = ModelSpec(role, settings, config, preprocess, tokenize)
    remade = settings.architecture is not None or settings.image_size is not None or settings.text_of is not None
    if remade or ":" in (settings.model or ""):
        # Mistakes that `architecture.check` does not know show when the model is built, here without memory for its weights.
        with torch.random.fork_rng(devices=[]):
            on_meta(description)
    return description


def of_padding(models: Mapping[str, ModelSpec]) -> list[str]:
    """A line, where texts of some of these models, by role, are not padded to their context; a teacher in a store reads none."""
    shorter = [role for role, model in models.items() if model.cuts_texts and getattr(model.settings, "store", None) is None]
    return [f"texts of {', '.join(shorter)} are padded to the longest of a batch"] if shorter else []


def configuration(settings: Model, role: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's `model_cfg` and `preprocess_cfg` of a model, without its tokenizer. Raises ValueError as `resolve` does."""
    if image_only.names_one(settings):
        return image_only.configuration(settings, role)
    config, stored = _configuration(settings, role)
    if settings.text_of is not None:
        config = _with_teachers_text(config, settings, settings.text_of, role)
    named = f"{role}.architecture" if settings.architecture is not None else f"{role}.model = {settings.model!r}: model_cfg"
    architecture.check(config, named, written=settings.architecture is not None)
    if (resized := resolution.resized(config, settings, role)) is not config:
        config = resized
        architecture.check(config, f"{role}.image_size: model_cfg", written=False)
    pretrained.check_activation(settings, config, role)
    return config, preprocessing.chosen(settings, role, stored)


def _configuration(settings: Model, role: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """As `configuration`, unchecked; the preprocessing is None for an open_clip name, whose tag has it."""
    name = settings.model or ""
    key = f"{role}.model = {name!r}"
    content: Any
    if settings.architecture is not None:
        key = f"{role}.architecture"
        config = copy.deepcopy(settings.architecture)
        content = {"preprocess_cfg": config.pop("preprocess_cfg", {}), "model_cfg": config}
    elif name.startswith(LOCAL):
        path = Path(name.removeprefix(LOCAL)) / CLIP_CONFIG
        if not path.is_file():
            raise ValueError(f"{key}: no {CLIP_CONFIG} in that folder; train that model first, or give another folder")
        key = f"{key}: {path}"
        content = texts.read_json(path, key)
    elif name.startswith(HUB):
        try:
            content = open_clip.factory._get_hf_config(name.removeprefix(HUB))
        except Exception as error:
            raise ValueError(
                f"{key}: the hub gave no open_clip configuration ({error}); check the name and the network{_of_images_alone(role)}"
            ) from error
    else:
        known: dict[str, Any] | None = get_model_config(pretrained.open_clip_name(name))
        if known is None:
            near = ", ".join(texts.nearest(name, open_clip.list_models(), most=3))
            suggestion = f"nearest: {near}; " if near else ""
            raise ValueError(f"{key}: open_clip has no such model; {suggestion}`open_clip.list_models()` lists all{_of_images_alone(role)}")
        return known, None
    if not isinstance(content, dict) or not isinstance(content.get("model_cfg"), dict):
        raise ValueError(f"{key}: no configuration of open_clip: it has no table model_cfg; export the model with open_clip or megakd")
    preprocess = content.get("preprocess_cfg") or {}
    if not isinstance(preprocess, dict):
        raise ValueError(f"{key}: preprocess_cfg = {texts.shown(preprocess)}: a table of mean, std, interpolation, resize_mode")
    return content["model_cfg"], preprocess


def _with_teachers_text(config: dict[str, Any], settings: Model, teacher: Model, role: str) -> dict[str, Any]:
    theirs, _ = configuration(teacher, "teacher")
    key, own = f"{role}.text_from = 'teacher'", settings.architecture or {}
    if "text_cfg" not in theirs:
        raise ValueError(f"{key}: {teacher.model} sees images alone and has no text tower; name a CLIP as [teacher], or take text_from out")
    if "text_cfg" in own:
        raise ValueError(f"{role}.architecture.text_cfg: text_from takes the teacher's text tower in its place; take one of the two out")
    if own.get("embed_dim", theirs["embed_dim"]) != theirs["embed_dim"]:
        raise ValueError(
            f"{role}.architecture.embed_dim = {texts.shown(own['embed_dim'])}: text_from takes the teacher's text tower, which embeds in "
            f"width {theirs['embed_dim']}; take embed_dim out"
        )
    return architecture.with_text_of(config, theirs, key)


def _of_images_alone(role: str) -> str:
    example = "; teachers of images alone are timm's, for example 'timm:vit_base_patch14_reg4_dinov2', or 'transformers:FOLDER'"
    return "" if role == "student" else example


def _check_weights(settings: Model, role: str) -> None:
    weights, name = settings.pretrained, settings.model or ""
    if image_only.names_one(settings):
        image_only.check_weights(settings, role)
        return
    if weights == RANDOM:
        return
    if ":" in name:
        if weights:
            raise ValueError(f"{role}.pretrained = {weights!r}: {name!r} brings its own weights; remove one of the two keys")
        if name.startswith(LOCAL):
            file = pretrained.in_folder(Path(name.removeprefix(LOCAL)))
            if file is None:
                raise ValueError(f"{role}.model = {name!r}: the folder has a configuration but no weights (open_clip_model.safetensors)")
            recognise(file)
    elif weights is None:
        if role == "teacher":
            raise ValueError(f"{role}.pretrained: missing; a teacher needs weights: a tag, a file, or 'random' if that is really meant")
    elif pretrained.is_file(weights) or Path(weights).is_dir():
        try:
            recognise(Path(weights))
        except ValueError as error:
            raise ValueError(f"{role}.pretrained = {weights!r}: {error}") from None
    elif pretrained.tag_of(settings) is None:
        known = list_pretrained_tags_by_model(pretrained.open_clip_name(name)) if name else []
        raise ValueError(
            f"{role}.pretrained = {weights!r}: neither a file ({', '.join(WEIGHT_SUFFIXES)}) nor a tag of "
            f"{name or 'this architecture'}; tags: {', '.join(known) or 'none'}"
        )


def build(description: ModelSpec, device: torch.device, precision: Precision = "fp32", *, load_weights: bool = True) -> ClipModel:
    """The model with its weights on `device`. Random initialisation draws from torch's global generator: seed it before.

    load_weights: False makes the architecture alone, on torch's meta device for example. precision: see `casts.to_bf16`.

    Raises ValueError when the weights do not fit the architecture, with the tensors that differ.
    """
    settings, role = description.settings, description.role
    try:
        clip = _architecture(description, device)
    except Exception as error:  # open_clip's and timm's constructors raise whatever a number inside them does
        whose = "architecture" if settings.architecture is not None else f"model = {settings.model!r}"
        raise ValueError(f"{role}.{whose} does not give a model: {type(error).__name__}: {error}") from error
    if load_weights and pretrained.is_random(settings):
        _initialise_text_projection(clip)
    elif load_weights:
        expected = {name: tuple(tensor.shape) for name, tensor in clip.state_dict().items()}
        with errors_of(role):
            match = Match(role, description.config, clip, expected, in_memory(pretrained.weights_file(settings, download=True)))
        match.read_into(clip)
    if precision == "bf16":
        casts.to_bf16(clip)  # after its weights: the logit scale is read in float32
    prepared = preprocessing.complete(description.preprocess, description.config)
    return ClipModel(clip, description, prepared, precisions.dtype(precision))


def on_meta(description: ModelSpec) -> ClipModel:
    """The model's shapes, without one weight, on torch's meta device."""
    with torch.device("meta"):
        return build(description, torch.device("meta"), load_weights=False)


def _initialise_text_projection(clip: nn.Module) -> None:
    """open_clip 3.3 leaves that of CoCa's text decoder as it was allocated, with NaN at times."""
    projection = getattr(getattr(clip, "text_decoder", None), "text_projection", None)
    if isinstance(projection, nn.Parameter) and not projection.is_meta:
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)


def with_library_weights(description: ModelSpec, *, image: bool = False, text: bool = False) -> nn.Module:
    """The model on the CPU, whose image tower has timm's own weights, or whose text tower has those of transformers; the rest is random.

    Raises ValueError where the library gives none.
    """
    try:
        return _architecture(description, torch.device("cpu"), image=image, text=text)
    except Exception as error:  # the libraries raise whatever their layers do
        raise ValueError(f"no weights came from {'timm' if image else 'transformers'}: {type(error).__name__}: {error}") from error


def _architecture(description: ModelSpec, device: torch.device, *, image: bool = False, text: bool = False) -> nn.Module:
    """As open_clip makes it from a folder without weights: one way for every source of a configuration that has a text tower.

    image, text: whether that tower gets its library's weights.
    """
    if not description.has_text:
        return image_only.ImageModel(description.config["vision_cfg"]).to(device)
    with tempfile.TemporaryDirectory() as folder, _without_warnings_of_random_weights():
        config = {"model_cfg": description.config, "preprocess_cfg": description.preprocess}
        (Path(folder) / CLIP_CONFIG).write_text(json.dumps(config), encoding="utf-8")
        model: nn.Module = open_clip.create_model(
            f"local-dir:{folder}", device=device, load_weights=False, pretrained_image=image, pretrained_text=text
        )
    resolution.set_size(model, description.settings)
    if description.cuts_texts:
        text_padding.accept(model)
    return model


@contextlib.contextmanager
def _without_warnings_of_random_weights() -> Iterator[None]:
    """open_clip warns of a folder without weights and of random initialisation, which is what is wanted; other warnings pass."""

    def wanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        expected = ("Model initialized randomly", "initialized partially", "no CLIP weights found")
        return not (record.name == "root" and any(part in text for part in expected))

    root = logging.getLogger()
    root.addFilter(wanted)
    try:
        yield
    finally:
        root.removeFilter(wanted)


def parameters_in(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
