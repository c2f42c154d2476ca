"""A trained model as a folder that open_clip loads: `open_clip.create_model_and_transforms("local-dir:RUN/model")`."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from megakd.models.student import SCALARS
from megakd.models.towers import CONFIG_FILE, Towers

WEIGHTS_FILE = "open_clip_model.safetensors"
_TOWERS = "clip."


def clip_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The towers' part of a checkpoint under open_clip's own names and shapes; the objectives' heads stay behind."""
    own = {name.removeprefix(_TOWERS): value for name, value in weights.items() if name.startswith(_TOWERS)}
    return {name: value.reshape(()) if name in SCALARS else value for name, value in own.items()}


def load_clip(clip: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put a checkpoint's towers into an open_clip model, strictly."""
    own = clip.state_dict()
    found = clip_weights(weights)
    # a model that has been in an engine's module has its scalars as vectors of one
    clip.load_state_dict({name: value.reshape(own[name].shape) if name in SCALARS else value for name, value in found.items()})


def write_model(folder: Path, weights: dict[str, Tensor], towers: Towers) -> None:
    """Write configuration, fp32 weights and tokenizer. An earlier export in `folder` is replaced as a whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(clip_weights(weights), partial / WEIGHTS_FILE)
    config = copy.deepcopy(towers.description.config)
    inner: Any = getattr(towers.description.tokenize, "tokenizer", None)
    if hasattr(inner, "save_pretrained"):
        # open_clip reads a tokenizer from the folder itself as soon as this key is there, whatever it says.
        config["text_cfg"].setdefault("hf_tokenizer_name", "in this folder")
        inner.save_pretrained(partial)
    content: dict[str, Any] = {"model_cfg": config, "preprocess_cfg": _plain(towers.preprocess)}
    (partial / CONFIG_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _plain(preprocess: Any) -> dict[str, Any]:
    return {key: preprocess.__dict__[key] for key in ("mean", "std", "interpolation", "resize_mode")}
