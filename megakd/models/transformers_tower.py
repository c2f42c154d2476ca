"""Vision towers of transformers as teachers: `teacher.model = "transformers:FOLDER"`, or `"transformers:ORG/NAME"` of the hub.

transformers' own class is built from config.json, of a vision tower or of a model that has one, and reads safetensors, or pickled tensors
as every teacher does; no code of a repository runs. preprocessor_config.json tells the images' size, mean, std and interpolation.

The embedding of an image is the class's `pooler_output`; where it has none, the class token (InternVL) or the mean over the patches
(SAM, SigLIP without its head). Legend: B images, V patches, D width of the embedding, C of a block, h x w the grid of patches.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from megakd.models.architecture import check_whole
from megakd.models.names import Part, Renamed
from megakd.models.weights import INDEX_SUFFIX, Shape, Weights
from megakd.recipe import texts

CONFIG, PREPROCESSING, PROCESSING = "config.json", "preprocessor_config.json", "processor_config.json"
WEIGHTS = "model.safetensors"
TABLE = "{ mean, std, interpolation, resize_mode }"
_CODE_OF_ITS_OWN = {
    "C-RADIO": ("radio", "timm:vit_large_patch16_radio_v3"),
    "InternViT": ("intern_vit", "timm:vit_intern300m_patch14_448"),
}


@dataclass(frozen=True)
class Kind:
    """model: transformers' class; blocks: where its layers are; prefix: class and register tokens before the patches, "class" being one
    and "registers" those that the configuration counts; resizes: "itself" where the class takes images of any size, "asked" where its
    forward has to be told to interpolate positions, None where it takes one size.
    """

    model: str
    blocks: str
    prefix: tuple[str, ...]
    resizes: str | None


KINDS = {
    "dinov2": Kind("Dinov2Model", "encoder.layer", ("class",), "itself"),
    "dinov2_with_registers": Kind("Dinov2WithRegistersModel", "encoder.layer", ("class", "registers"), "itself"),
    "dinov3_vit": Kind("DINOv3ViTModel", "model.layer", ("class", "registers"), "itself"),
    "siglip_vision_model": Kind("SiglipVisionModel", "encoder.layers", (), "asked"),
    "clip_vision_model": Kind("CLIPVisionModel", "encoder.layers", ("class",), "asked"),
    "sam_vision_model": Kind("SamVisionModel", "vision_encoder.layers", (), None),
    "internvl_vision": Kind("InternVLVisionModel", "encoder.layer", ("class",), "itself"),
}
WHOLE = {"siglip": "siglip_vision_model", "clip": "clip_vision_model", "sam": "sam_vision_model", "internvl": "internvl_vision"}

# Where a larger model has its vision tower, and what such a model or a classifier has beside it.
_TOWER = re.compile(r"(model\.)?(vision_tower|vision_model|vision_encoder|dinov2|dinov2_with_registers)\.")
_BESIDE = re.compile(
    r"(model\.)?(text_model|language_model|multi_modal_projector|prompt_encoder|mask_decoder|shared_image_embedding)\..*"
    r"|(lm_head|classifier|visual_projection|text_projection)\..*|logit_scale|logit_bias|.*embeddings\.position_ids"
)
# Names of the hub's files -> those of the classes since transformers 5.
_RENAMED = (
    (re.compile(r"\.attention\.attention\.(query|key|value)\."), lambda match: f".attention.{match[1][0]}_proj."),
    (re.compile(r"\.attention\.output\.dense\."), lambda match: ".attention.o_proj."),
    (re.compile(r"\.mlp\.weights_out\."), lambda match: ".mlp.down_proj."),
    (re.compile(r"^model\.layer\."), lambda match: "layer."),
)
_GATED = ".mlp.weights_in."  # gate and values in one matrix


class TransformersTower(nn.Module):
    """A vision tower of transformers, whose forward gives the embedding of an image. image_size: (H, W)."""

    def __init__(self, vision: Mapping[str, Any]) -> None:
        """vision: as `described` gives it."""
        super().__init__()
        config, self.kind = vision["transformers"], KINDS[vision["transformers"]["model_type"]]
        self.image_size: tuple[int, int] = tuple(vision["image_size"])
        settings: Any = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        self.trunk: nn.Module = getattr(transformers, self.kind.model)(settings)
        counts = {"class": 1, "registers": getattr(settings, "num_register_tokens", 0)}
        self.prefix_tokens = sum(counts[each] for each in self.kind.prefix)
        self._asked = {"interpolate_pos_encoding": True} if self.kind.resizes == "asked" and self.image_size != _own_size(config) else {}

    def blocks(self) -> list[nn.Module]:
        return list(self.trunk.get_submodule(self.kind.blocks).children())

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, D) of (B, 3, H, W)."""
        return self.pooled(self.trunk(pixels, **self._asked))

    def pooled(self, output: Any) -> Tensor:
        """(B, D) of what the trunk gave: tokens (B, prefix + V, D) or a map (B, D, h, w), and perhaps a pooled output."""
        if (pooler := output.get("pooler_output")) is not None:
            return pooler  # type: ignore[no-any-return]
        last: Tensor = output.last_hidden_state
        if last.ndim == 4:
            return last.mean((2, 3))
        return last[:, 0] if "class" in self.kind.prefix else last.mean(1)

    def pooling(self, output: Any) -> str:
        """The same for people."""
        if output.get("pooler_output") is not None:
            return f"pooler_output of {self.kind.model}"
        by = "class token" if "class" in self.kind.prefix else "mean over the patches"
        return f"{by} of {self.kind.model}, which has no pooler_output"


def described(
    name: str, key: str, image_size: tuple[int, int] | None = None, *, whole_preprocessing: bool
) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """`vision_cfg`, D and the stored preprocessing of a folder or repository, without its weights.

    key: the recipe's, for messages. image_size: (H, W) that the recipe gives in place of the processor's. whole_preprocessing: the recipe
    gives all of it, so that none has to be stored.
    Raises ValueError for a folder that is no such model, code of its own, an unknown kind, preprocessing that is missing or that is not
    that of a tower here, and a size that the tower does not take.
    """
    content = _json(name, CONFIG, key)
    if content is None:
        raise ValueError(f"{key}: no {CONFIG} in that folder, so it is no model of transformers; save one there with save_pretrained")
    config = _vision_config(content, key)
    stored = _json(name, PREPROCESSING, key)
    if stored is None and (processor := _json(name, PROCESSING, key)) is not None:
        stored = processor.get("image_processor")
    if stored is None and not whole_preprocessing:
        raise ValueError(
            f"{key}: no {PREPROCESSING} there, so nothing says how its images are prepared; copy it from where the model came, or give "
            f"the key preprocess = {TABLE} beside"
        )
    ways, size = ({}, None) if stored is None else _prepared(stored, f"{key}: {PREPROCESSING}", required=not whole_preprocessing)
    vision: dict[str, Any] = {"transformers": config, "image_size": list(image_size or size or _own_size(config))}
    _check_size(vision, key if image_size is None else f"{key}: image_size = {list(image_size)}")
    embed_dim, vision["pooled"] = _outline(json.dumps(vision, sort_keys=True), key)
    return vision, embed_dim, ways


def weights_file(name: str, *, download: bool) -> Path | None:
    """The file of a repository's weights, or the index of its files, on this machine; None where it is not here and `download` is False.

    Raises ValueError where the hub has none in safetensors.
    """
    for file in (WEIGHTS, f"{WEIGHTS.removesuffix('.safetensors')}{INDEX_SUFFIX}"):
        if isinstance(path := try_to_load_from_cache(name, file), str):
            if download and file.endswith(INDEX_SUFFIX):
                snapshot_download(name, allow_patterns=["*.safetensors"])
            return Path(path)
    if not download:
        return None
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", f"*{INDEX_SUFFIX}"]))
    except Exception as error:  # the hub's client raises what its layers do
        raise ValueError(f"no weights of {name} came ({error}); check the network") from error
    found = [path for path in (folder / WEIGHTS, *sorted(folder.glob(f"*{INDEX_SUFFIX}"))) if path.is_file()]
    if not found:
        raise ValueError(f"{name}: the hub has no {WEIGHTS} of it; convert its weights with save_pretrained, and give that folder")
    return found[0]


def is_folder(name: str) -> bool:
    """Whether `transformers:NAME` is a folder rather than a repository of the hub."""
    return os.path.isdir(name) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)


def renamed(weights: Weights, expected: Iterable[str], prefix: str) -> Weights:
    """A file of transformers under the names of a tower's state. expected: those names, each of which begins with `prefix`.

    Files of the hub have names from before transformers 5, or are of a larger model, whose other parts are left out; unknown names stay.
    """
    own = {_canonical(name.removeprefix(prefix)): name for name in expected}
    parts: dict[str, Part] = {}
    wanted = {name: _canonical(name) for name in weights.shapes if not _BESIDE.fullmatch(name)}
    counts = Counter(wanted.values())
    for name, plain in wanted.items():
        shape = weights.shapes[name]
        if _GATED in plain and plain not in own and shape:
            half: Shape = (shape[0] // 2, *shape[1:])
            for place, gate in enumerate(("gate_proj", "up_proj")):
                new = plain.replace(_GATED, f".mlp.{gate}.")
                parts[own.get(new, new)] = Part((name,), half, functools.partial(_half, place))
        else:
            parts[own.get(plain, name) if counts[plain] == 1 else name] = Part((name,), shape)
    return Renamed(weights, parts)


def _half(place: int, tensors: list[Tensor]) -> Tensor:
    return tensors[0].chunk(2)[place]


def _canonical(name: str) -> str:
    """One name for a tensor, wherever the tower lies and whichever version of transformers wrote the file."""
    name = _TOWER.sub("", name) if _TOWER.match(name) else name
    for pattern, new in _RENAMED:
        name = pattern.sub(new, name)
    return name


def _json(name: str, file: str, key: str) -> dict[str, Any] | None:
    """A file of the folder or repository; None where it has none. Raises ValueError for a folder or repository that is not there."""
    if is_folder(name):
        if not os.path.isdir(name):
            raise ValueError(f"{key}: no such folder, and no name of a repository, ORG/NAME")
        path = Path(name) / file
        if not path.is_file():
            return None
    else:
        try:
            path = Path(hf_hub_download(name, file))
        except Exception as error:  # the hub's client raises what its layers do
            if file != CONFIG and isinstance(error, EntryNotFoundError):
                return None
            raise ValueError(f"{key}: no such folder, and the hub gave no {file} ({error}); check the name and the network") from error
    content = texts.read_json(path, f"{key}: {path}")
    if not isinstance(content, dict):
        raise ValueError(f"{key}: {path} holds no table; save the model anew with save_pretrained")
    return content


def _vision_config(content: dict[str, Any], key: str) -> dict[str, Any]:
    """The configuration of the vision tower alone. Raises ValueError for one that transformers' own classes here do not have."""
    kind = str(content.get("model_type"))
    config = content if kind in KINDS else content.get("vision_config") if kind in WHOLE else None
    if config is None:
        known = ", ".join((*KINDS, *WHOLE))
        code = content.get("auto_map")
        family = f"{kind} {' '.join(map(str, content.get('architectures') or ()))}".lower()
        others = [f"timm has {whose}: model = {model!r}" for whose, (mark, model) in _CODE_OF_ITS_OWN.items() if mark in family]
        remedy = "; ".join(others) or "for timm's models write timm:NAME"
        if code:
            raise ValueError(f"{key}: needs code of its own (trust_remote_code), which never runs here; known are {known}; {remedy}")
        raise ValueError(f"{key}: model_type = {kind!r} is no vision tower known here; known are {known}; {remedy}")
    if not isinstance(config, dict):
        raise ValueError(f"{key}: vision_config = {texts.shown(config)}: a table; save the model anew with save_pretrained")
    about = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "auto_map", "attn_implementation")
    return {name: value for name, value in config.items() if name not in about} | {"model_type": WHOLE.get(kind, kind)}


def _prepared(stored: Any, key: str, *, required: bool) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """How images are prepared, in open_clip's terms, and (H, W). Raises ValueError for what its transforms cannot do."""
    if not isinstance(stored, dict):
        raise ValueError(f"{key} holds no table; copy it anew from where the model came")
    by_number = {"2": "bilinear", "3": "bicubic"}  # PIL's
    ways: dict[str, Any] = {}
    if stored.get("do_normalize", True):
        ways |= {name: stored[f"image_{name}"] for name in ("mean", "std") if stored.get(f"image_{name}") is not None}
    else:
        ways |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    if stored.get("resample") is not None:
        if str(stored["resample"]) not in by_number:
            raise ValueError(
                f"{key}: resample = {texts.shown(stored['resample'])}: of PIL's interpolations 2, bilinear, and 3, bicubic, alone"
            )
        ways["interpolation"] = by_number[str(stored["resample"])]
    if not stored.get("do_rescale", True) or abs(255 * stored.get("rescale_factor", 1 / 255) - 1) > 1e-3:
        raise ValueError(f"{key}: its images are not scaled to 0 to 1 (do_rescale, rescale_factor), as every tower's here are")
    size, mode = _size(stored)
    if mode is not None:
        ways["resize_mode"] = mode
    if required and (missing := [name for name in ("mean", "std", "interpolation") if name not in ways]):
        raise ValueError(f"{key} does not tell {', '.join(missing)}; give the key preprocess = {TABLE} beside")
    return ways, size


def _size(stored: Mapping[str, Any]) -> tuple[tuple[int, int] | None, str | None]:
    """(H, W) that a processor gives a tower, and open_clip's word for the way there; None for what is not told."""

    def sides(value: Any) -> tuple[int, int] | None:
        if isinstance(value, int):
            return value, value
        return (int(value["height"]), int(value["width"])) if isinstance(value, dict) and {"height", "width"} <= value.keys() else None

    resized = stored.get("size")
    longest = resized.get("longest_edge") if isinstance(resized, dict) else None
    if stored.get("do_center_crop") and (cropped := sides(stored.get("crop_size"))) is not None:
        return cropped, "shortest"
    if stored.get("do_pad") and longest is not None:
        return sides(stored.get("pad_size")) or sides(longest), "longest"
    if isinstance(resized, dict) and "shortest_edge" in resized:
        return sides(resized["shortest_edge"]), "shortest"
    return sides(resized), None if sides(resized) is None else "squash"


def _own_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) of the configuration, by transformers' default where it is not written."""
    size: Any = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _check_size(vision: Mapping[str, Any], key: str) -> None:
    """Raises ValueError for images of a size that the tower does not take."""
    config, kind = vision["transformers"], KINDS[vision["transformers"]["model_type"]]
    height, width = vision["image_size"]
    try:
        own = _own_size(config)
        patch: Any = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).patch_size
    except Exception as error:  # transformers' configurations check themselves with errors of their own
        raise ValueError(f"{key}: {CONFIG} gives no model: {type(error).__name__}: {error}") from error
    rows, columns = (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))
    if kind.resizes is None and (height, width) != own:
        raise ValueError(f"{key}: {kind.model} takes images of {own[0]} x {own[1]} alone, and they are {height} x {width}")
    if min(height, width) < 1:
        raise ValueError(f"{key}: images of {height} x {width} pixels are no whole patches of {rows} x {columns}")
    check_whole((height, width), (rows, columns), key)


@functools.cache
def _outline(vision: str, key: str) -> tuple[int, str]:
    """D, and what is pooled, from a model without weights. vision: as JSON."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        try:
            tower = TransformersTower(json.loads(vision)).eval()
            output = tower.trunk(torch.empty(1, 3, *tower.image_size), **tower._asked)
            pooled = tower.pooled(output)
        except Exception as error:  # transformers' constructors raise whatever a number inside them does
            raise ValueError(f"{key}: {CONFIG} gives no model of images: {type(error).__name__}: {error}") from error
    return int(pooled.shape[1]), tower.pooling(output)
