"""Teachers that see images alone: a timm model, `teacher.model = "timm:NAME"`, with its own size, mean, std and pooling, or a vision tower
of transformers, `"transformers:FOLDER"` (`transformers_tower.py`).

DINOv2 and DINOv3, SAM's encoder, SigLIP's vision tower, InternViT, C-RADIO and AIMv2 are timm models. One is described as a CLIP without a
`text_cfg`, so that weights are read, quantised, partitioned and counted as those of every other teacher.
Legend: B images, D width of the pooled output.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from megakd.models import preprocessing, transformers_tower
from megakd.models.architecture import check_whole
from megakd.models.pretrained import OF_TRANSFORMERS, RANDOM, TIMM, WEIGHT_SUFFIXES, in_folder, is_file, tag_of
from megakd.models.transformers_tower import TransformersTower
from megakd.models.weight_kinds import recognise
from megakd.recipe import Model, Teacher, texts

# Classes of timm whose layers are quantised and partitioned as tests have it; others run replicated in 16 bits.
KNOWN = ("ConvNeXt", "Eva", "FastVit", "SwinTransformer", "VisionTransformer", "VisionTransformerSAM")
SAVED_ONCE = "save the state_dict of timm.create_model(NAME, pretrained=True) once, as a .safetensors file, and give that file"
_RESIZE_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}  # of timm's crop modes


class ImageTower(nn.Module):
    """A timm model without a classifier, pooled as its authors do. image_size: (H, W). options: of timm's constructor, see `_resized`."""

    def __init__(self, name: str, image_size: tuple[int, int], options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.image_size = image_size
        self.trunk = timm.create_model(name, num_classes=0, **(options or {}))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, D) of (B, 3, H, W)."""
        return self.trunk(pixels)  # type: ignore[no-any-return]


class ImageModel(nn.Module):
    """Stands where open_clip's models do, without a text tower, a logit scale or a bias."""

    def __init__(self, vision: dict[str, Any]) -> None:
        """vision: the `vision_cfg` of `configuration`."""
        super().__init__()
        self.visual: ImageTower | TransformersTower
        if "transformers" in vision:
            self.visual = TransformersTower(vision)
        else:
            self.visual = ImageTower(vision["timm_model_name"], tuple(vision["image_size"]), vision.get("timm_options"))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)  # type: ignore[no-any-return]


def names_one(settings: Model) -> bool:
    """Whether `model` names a model that sees images alone."""
    return (settings.model or "").startswith((TIMM, OF_TRANSFORMERS))


def no_words(captions: list[str]) -> Tensor:
    """(n, 0): what a model without a text tower reads of n captions."""
    return torch.zeros((len(captions), 0), dtype=torch.long)


def configuration(settings: Model, role: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `clip.configuration`, without `text_cfg`: the preprocessing is that of timm's tag, or of the folder of transformers.

    Raises ValueError naming the key: an unknown name, no teacher, keys that are for texts, and a class whose layers the mode does not know.
    """
    name, key = (settings.model or "").removeprefix(TIMM), f"{role}.model = {settings.model!r}"
    if not isinstance(settings, Teacher):
        raise ValueError(
            f"{key}: has no text tower, and only a teacher can be without one; for a student with timm's tower give {role}.architecture "
            f"with vision_cfg.timm_model_name and a text_cfg"
        )
    if settings.tokenizer is not None:
        raise ValueError(f"{role}.tokenizer = {settings.tokenizer!r}: {settings.model} has no text tower to read its words; take it out")
    if settings.scale is not None:
        raise ValueError(f"{role}.scale = {settings.scale!r}: {settings.model} has no text tower, and so no logits to scale; take it out")
    if settings.store is not None:
        raise ValueError(f"{role}.store = {settings.store!r}: {no_store(settings, role)}")
    if name.startswith(OF_TRANSFORMERS):
        return _of_transformers(settings, name.removeprefix(OF_TRANSFORMERS), role)
    base, _, tag = name.partition(".")
    if tag and timm.is_model(base):
        raise ValueError(f"{key}: write the tag as {role}.pretrained = {tag!r}, and {role}.model = '{TIMM}{base}'")
    if not timm.is_model(name):
        near = ", ".join(texts.nearest(name, timm.list_models(), most=3))
        raise ValueError(f"{key}: timm has no such model; {f'nearest: {near}; ' if near else ''}`timm.list_models()` lists all")
    described = _pretrained_cfg(settings, role)
    data = resolve_data_config(pretrained_cfg=described)
    channels, height, width = data["input_size"]
    if channels != 3:
        raise ValueError(f"{key}: takes images of {channels} channels; choose one for 3, red, green and blue")
    own_tag = _tag(settings)
    tagged = f"{name}.{own_tag}" if own_tag else name
    vision: dict[str, Any] = {"timm_model_name": tagged, "image_size": [height, width]}
    if settings.image_size is not None and settings.image_size != (height, width):
        height, width = settings.image_size
        key = f"{role}.image_size = {list(settings.image_size)}: {settings.model}"
        options = _resized(tagged, (height, width), key, fixed=described.get("fixed_input_size", True))
        vision = {"timm_model_name": tagged, "image_size": [height, width], "timm_options": options}
    kind, embed_dim = _outline(json.dumps(vision), key)
    if settings.mode != "replicated" and kind not in KNOWN:
        raise ValueError(
            f"{role}.mode = {settings.mode!r}: layers of timm's {kind} are not known in 8 bit or partitioned; set it to 'replicated', or "
            f"take a model of class {', '.join(KNOWN)}"
        )
    stored = {key: data[key] for key in ("mean", "std", "interpolation")} | {"resize_mode": _RESIZE_MODES.get(data["crop_mode"])}
    unnamed = settings.model_copy(update={"preprocess": None}) if isinstance(settings.preprocess, str) else settings
    return {"embed_dim": embed_dim, "vision_cfg": vision}, preprocessing.chosen(unnamed, role, stored)


def _of_transformers(settings: Teacher, name: str, role: str) -> tuple[dict[str, Any], dict[str, Any]]:
    key = f"{role}.model = {settings.model!r}"
    if isinstance(settings.preprocess, str):
        raise ValueError(f"{role}.preprocess = {settings.preprocess!r}: names a tag; for {settings.model} give {transformers_tower.TABLE}")
    given = settings.preprocess is not None and None not in settings.preprocess.model_dump().values()
    vision, embed_dim, stored = transformers_tower.described(name, key, settings.image_size, whole_preprocessing=given)
    return {"embed_dim": embed_dim, "vision_cfg": vision}, preprocessing.chosen(settings, role, stored)


def check_weights(settings: Model, role: str) -> None:
    """Raises ValueError for `pretrained` that names neither random weights, a tag of timm that can be read, a file nor a folder; for a
    model of transformers, that names any weights but its own, or whose folder has none that can be read.
    """
    weights, name = settings.pretrained, (settings.model or "").removeprefix(TIMM)
    key = f"{role}.pretrained = {weights!r}"
    if weights == RANDOM:
        return
    if name.startswith(OF_TRANSFORMERS):
        if weights:
            raise ValueError(f"{key}: {settings.model!r} brings its own weights; remove one of the two keys")
        folder = name.removeprefix(OF_TRANSFORMERS)
        if transformers_tower.is_folder(folder):
            if (file := in_folder(Path(folder))) is None:
                raise ValueError(f"{role}.model = {settings.model!r}: the folder has a configuration but no weights (model.safetensors)")
            recognise(file)
        return
    if weights is None:
        raise ValueError(f"{role}.pretrained: missing; a teacher needs weights: a tag, a file, or 'random' if that is really meant")
    if is_file(weights) or Path(weights).is_dir():
        try:
            file = in_folder(Path(weights)) if Path(weights).is_dir() else Path(weights)
            if file is None:
                raise ValueError("a folder without weights (model.safetensors)")
            recognise(file)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        return
    if weights not in (known := _tags(name)):
        kinds = ", ".join(WEIGHT_SUFFIXES)
        raise ValueError(f"{key}: neither a file ({kinds}), a folder nor a tag of timm's {name}; tags: {', '.join(known) or 'none'}")
    if tag_of(settings) is None:
        raise ValueError(
            f"{key}: timm has its weights from elsewhere than its repositories in the hub: {SAVED_ONCE}, with "
            f"{role}.preprocess = {weights!r}"
        )


def no_store(settings: Model, role: str) -> str:
    """Why a store cannot hold this teacher, and what to do."""
    return f"{settings.model} has no text tower, and a store holds embeddings of pairs; run this {role} beside the student, without a store"


def _tags(name: str) -> list[str]:
    return [known.partition(".")[2] for known in timm.list_pretrained(name)]


def _tag(settings: Model) -> str | None:
    """timm's tag of the weights, or that whose preprocessing a recipe names for weights of a file."""
    named = settings.preprocess if isinstance(settings.preprocess, str) else settings.pretrained
    return named if named in _tags((settings.model or "").removeprefix(TIMM)) else None


def _pretrained_cfg(settings: Model, role: str) -> dict[str, Any]:
    """timm's description of the weights. Raises ValueError where a file does not tell which tag's preprocessing is its own."""
    name, tag = (settings.model or "").removeprefix(TIMM), _tag(settings)
    tags, weights, preprocess = _tags(name), settings.pretrained or "", settings.preprocess
    if isinstance(preprocess, str) and tag is None:
        raise ValueError(f"{role}.preprocess = {preprocess!r}: no tag of timm's {name}; tags: {', '.join(tags) or 'none'}")
    told = preprocess is not None and (isinstance(preprocess, str) or None not in preprocess.model_dump().values())
    if (is_file(weights) or Path(weights).is_dir()) and not told:
        ways = [resolve_data_config(pretrained_cfg=_cfg(f"{name}.{tag}")) for tag in tags]
        if len({tuple(way[key] for key in ("input_size", "mean", "std", "interpolation")) for way in ways}) > 1:
            raise ValueError(
                f"{role}.pretrained = {weights!r}: the tags of {name} were trained with different preprocessing, and a file does not say "
                f"its own: set {role}.preprocess to the tag whose it is: {', '.join(tags)}"
            )
    return _cfg(f"{name}.{tag}" if tag else name)


def _cfg(name: str) -> dict[str, Any]:
    """timm's description of a tag, or of a model's first one; empty where it has none."""
    found = timm.get_pretrained_cfg(name)
    return {} if found is None else found.to_dict()


def _resized(name: str, image_size: tuple[int, int], key: str, *, fixed: bool) -> dict[str, Any]:
    """What timm's constructor is told for images of another size than the tag's, so that the tag's weights fit as they are.

    fixed: whether timm says that the model takes one size. Positions are interpolated by timm itself, in each forward.
    Raises ValueError for a model whose weights are of one size, and for images that are no whole patches.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        own: Any = timm.create_model(name, num_classes=0)
        kind, patch = type(own).__name__, getattr(getattr(own, "patch_embed", None), "patch_size", None)
        if isinstance(patch, tuple):
            check_whole(image_size, patch, key)
        if not fixed or kind == "VisionTransformerSAM":
            return {}
        shapes = {name: tensor.shape for name, tensor in own.state_dict().items()}
        for options in ({"img_size": list(image_size)}, {"dynamic_img_size": True}):  # of relative positions, of absolute ones
            try:
                model = timm.create_model(name, num_classes=0, **options)
            except Exception:
                continue
            if {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes:
                return options
    raise ValueError(f"{key}: timm's {kind} has positions of one size; take it out, or choose a ViT, an EVA or a convolutional model")


@functools.cache
def _outline(vision: str, key: str) -> tuple[str, int]:
    """timm's class and D, from a model without weights. vision: as JSON. Raises ValueError for one that gives no row an image."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        try:
            tower = ImageModel(json.loads(vision)).visual.eval()
            pooled = tower(torch.empty(1, 3, *tower.image_size))
        except Exception as error:  # timm's constructors raise whatever a number inside them does
            raise ValueError(f"{key}: timm gives no model of images: {type(error).__name__}: {error}") from error
    if not isinstance(pooled, Tensor) or pooled.ndim != 2:
        raise ValueError(f"{key}: gives no embedding of an image, one row; choose a model with a pooled output")
    return type(tower.trunk).__name__, int(pooled.shape[1])
