"""A CLIP-style pair of towers from a recipe's `[student]` or `[teacher]`: by open_clip name, hub, folder or own architecture.

`describe` needs no weights and finds every mistake of the settings in milliseconds; `build` makes the model. Both go through
open_clip's `local-dir:` form for an architecture given in the recipe, so that one code path serves all four sources.
"""

from __future__ import annotations

import copy
import difflib
import json
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import get_model_config, load_checkpoint
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from torch import Tensor, nn

from megakd.models import casts
from megakd.models.originals import Originals
from megakd.models.weights import INDEX_SUFFIX
from megakd.recipe import Model
from megakd.runtime import precision as precisions
from megakd.runtime.precision import Precision

CONFIG_FILE = "open_clip_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
RANDOM = "random"


@dataclass(frozen=True)
class Description:
    """What is known of a model before its weights are touched."""

    role: str
    settings: Model
    config: dict[str, Any]
    preprocess: dict[str, Any]
    tokenize: Callable[[list[str]], Tensor]

    @property
    def width(self) -> int:
        """Width D of the joint embedding."""
        return int(self.config["embed_dim"])

    @property
    def has_bias(self) -> bool:
        """Whether the model adds a learned bias to its logits, as those trained with a sigmoid loss do."""
        return self.config.get("init_logit_bias") is not None

    @property
    def context_length(self) -> int:
        return int(self.config["text_cfg"].get("context_length", 77))


@dataclass(frozen=True)
class Towers:
    """A built model with what its data needs. `config` and `preprocess` are open_clip's, so `export` can write them back.

    dtype: of the pixels that the model takes. Its parameters do not tell: some of a bf16 model's are float32 (see `casts.to_bf16`).
    originals: the matrices of an int8 model that was read from weights, for whoever wants to read them again.
    """

    clip: nn.Module
    description: Description
    preprocess: PreprocessCfg
    dtype: torch.dtype = torch.float32
    originals: Originals | None = None


def describe(settings: Model, role: str) -> Description:
    """Read the model's configuration and tokenizer. role: "student" or "teacher", for messages.

    Raises ValueError naming the key and the remedy: unknown name, missing folder or file, an architecture that does not parse,
    a tokenizer with more words than the text tower's vocabulary.
    """
    config, preprocess = configuration(settings, role)
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in config:
            raise ValueError(f"{role}.architecture.{key}: missing; an open_clip model configuration has embed_dim, vision_cfg and text_cfg")
    _check_weights(settings, role)
    return Description(role, settings, config, preprocess, _tokenizer(settings, config, role))


def configuration(settings: Model, role: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's `model_cfg` and `preprocess_cfg` of a model, without its tokenizer. Raises ValueError as `describe` does."""
    if settings.architecture is not None:
        config = copy.deepcopy(settings.architecture)
        return config, config.pop("preprocess_cfg", {})
    name = settings.model or ""
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / CONFIG_FILE
        if not path.is_file():
            raise ValueError(f"{role}.model = {name!r}: no {CONFIG_FILE} in that folder; train that model first, or give another folder")
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["model_cfg"], stored.get("preprocess_cfg", {})
    if name.startswith("hf-hub:"):
        try:
            stored = open_clip.factory._get_hf_config(name.removeprefix("hf-hub:"))
        except Exception as error:
            raise ValueError(
                f"{role}.model = {name!r}: the hub gave no open_clip configuration ({error}); check the name and the network"
            ) from error
        return stored["model_cfg"], stored.get("preprocess_cfg", {})
    known = get_model_config(name.replace("/", "-"))
    if known is None:
        nearest = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.5)
        suggestion = f"nearest: {', '.join(nearest)}; " if nearest else ""
        raise ValueError(f"{role}.model = {name!r}: open_clip has no such model; {suggestion}`open_clip.list_models()` lists all")
    return known, {}


def _check_weights(settings: Model, role: str) -> None:
    pretrained, name = settings.pretrained, settings.model or ""
    if ":" in name:
        if pretrained and pretrained != RANDOM:
            raise ValueError(f"{role}.pretrained = {pretrained!r}: {name!r} brings its own weights; remove one of the two keys")
        if name.startswith("local-dir:") and not _weights_in(Path(name.removeprefix("local-dir:"))):
            raise ValueError(f"{role}.model = {name!r}: the folder has a configuration but no weights (open_clip_model.safetensors)")
        return
    if pretrained is None or pretrained == RANDOM:
        if role == "teacher" and pretrained is None:
            raise ValueError(f"{role}.pretrained: missing; a teacher needs weights: a tag, a file, or 'random' if that is really meant")
        return
    if pretrained.endswith(INDEX_SUFFIX) and getattr(settings, "mode", "replicated") == "replicated":
        raise ValueError(
            f"{role}.pretrained = {pretrained!r}: several files with an index are read by the streaming load alone; "
            f"set teacher.mode to replicated_int8, zero3 or zero3_int8, or merge the files"
        )
    if pretrained.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX)):
        if not Path(pretrained).is_file():
            raise ValueError(f"{role}.pretrained = {pretrained!r}: no such file")
        return
    tags = open_clip.list_pretrained_tags_by_model(name) if name else []
    if pretrained not in tags:
        raise ValueError(
            f"{role}.pretrained = {pretrained!r}: neither a file ({', '.join(WEIGHT_SUFFIXES)}) nor a tag of "
            f"{name or 'this architecture'}; tags: {', '.join(tags) or 'none'}"
        )


def _weights_in(folder: Path) -> bool:
    return any((folder / f"open_clip_{kind}").is_file() for kind in ("model.safetensors", "pytorch_model.bin"))


def _tokenizer(settings: Model, config: dict[str, Any], role: str) -> Callable[[list[str]], Tensor]:
    length = config["text_cfg"].get("context_length", 77)
    try:
        if settings.tokenizer is not None:
            if not Path(settings.tokenizer).is_dir():
                raise ValueError("no such folder; `megakd shapes` writes one beside its shards")
            tokenizer: Any = HFTokenizer(settings.tokenizer, context_length=length)
        elif settings.architecture is not None:
            tokenizer = open_clip.SimpleTokenizer(context_length=length)
        else:
            tokenizer = open_clip.get_tokenizer(settings.model or "", context_length=length)
    except Exception as error:
        raise ValueError(f"{role}.tokenizer = {settings.tokenizer!r}: {error}") from error
    words, vocabulary = _vocabulary_size(tokenizer), config["text_cfg"].get("vocab_size", 49408)
    if words is not None and words > vocabulary:
        raise ValueError(
            f"{role}.tokenizer has {words} words, but the text tower's vocab_size is {vocabulary}: raise vocab_size or change the tokenizer"
        )
    return tokenizer  # type: ignore[no-any-return]


def _vocabulary_size(tokenizer: Any) -> int | None:
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    size = getattr(inner, "vocab_size", None)
    return len(inner) if hasattr(inner, "__len__") else size


def build(description: Description, device: torch.device, precision: Precision = "fp32", *, load_weights: bool = True) -> Towers:
    """The model with its weights on `device`. Random initialisation draws from torch's global generator: seed it before.

    load_weights: False makes the architecture alone, on torch's meta device for example. precision: see `casts.to_bf16`.

    Raises ValueError when the weights do not fit the architecture, with open_clip's list of the tensors that differ.
    """
    settings = description.settings
    load_weights = load_weights and settings.pretrained != RANDOM
    pretrained = settings.pretrained if load_weights else None
    try:
        if settings.architecture is not None:
            clip = _from_architecture(description, device)
            if pretrained is not None:
                load_checkpoint(clip, pretrained, strict=True, weights_only=True, device="cpu")
        else:
            required = load_weights and (":" in (settings.model or "") or pretrained is not None)
            clip = open_clip.create_model(
                settings.model or "",
                pretrained=pretrained,
                load_weights=load_weights,
                device=device,
                require_pretrained=required,
            )
    except (pickle.UnpicklingError, SafetensorError) as error:
        # torch's own message advises to execute what is in the file.
        source = settings.pretrained or settings.model
        raise ValueError(
            f"{description.role}: {source!r} is no file of plain tensors ({type(error).__name__}), and nothing in it is ever executed; "
            f"convert it to .safetensors where you trust it"
        ) from error
    except (RuntimeError, KeyError) as error:
        source = settings.pretrained or settings.model
        raise ValueError(f"{description.role}: {source!r} does not give a model: {error}") from error
    if precision == "bf16":
        casts.to_bf16(clip)  # with its weights: the logit scale is read in float32
    visual: Any = clip.visual
    preprocess = {field.name: visual.preprocess_cfg[field.name] for field in fields(PreprocessCfg)}
    return Towers(clip, description, PreprocessCfg(**preprocess), precisions.dtype(precision))


def _from_architecture(description: Description, device: torch.device) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_cfg": description.config, "preprocess_cfg": description.preprocess}
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        model: nn.Module = open_clip.create_model(f"local-dir:{folder}", device=device)
    return model


def parameters_in(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
