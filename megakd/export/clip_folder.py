"""A trained model as a folder that open_clip loads: `open_clip.create_model_and_transforms("local-dir:RUN/model")`."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from safetensors.torch import save_file
from torch import Tensor, nn

from megakd.models import clip
from megakd.models.casts import SCALARS
from megakd.models.clip import ClipModel, ModelSpec
from megakd.models.patches import image_size
from megakd.models.preprocessing import KEYS, complete
from megakd.models.tokenizing import SAMPLES
from megakd.recipe.chain import CLIP_CONFIG
from megakd.runtime.files import atomic_folder

WEIGHTS_FILE = "open_clip_model.safetensors"
HEADS_FILE = "heads.safetensors"
_TOWERS, _HEADS = "clip.", "heads."


def clip_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The towers of a checkpoint under open_clip's own names and shapes, without the objectives' heads."""
    own = {name.removeprefix(_TOWERS): value for name, value in weights.items() if name.startswith(_TOWERS)}
    return {name: value.reshape(()) if name in SCALARS else value for name, value in own.items()}


def load_clip(clip: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's towers into an open_clip model, strictly."""
    own = clip.state_dict()
    towers = clip_weights(weights)
    # `Student` makes the scalars of its model vectors of length 1.
    clip.load_state_dict({name: value.reshape(own[name].shape) if name in SCALARS else value for name, value in towers.items()})


def write_model(folder: Path, weights: dict[str, Tensor], built: ClipModel, heads: Mapping[str, Any] | None = None) -> None:
    """Write configuration, fp32 weights and tokenizer. An earlier export in `folder` is replaced.

    heads: what is known of each of the objectives' heads, by its name: their weights are written, too, as HEAD.PARAMETER, with `heads` as
    JSON in that file's metadata. Nothing of open_clip's reads it.
    Before that open_clip loads the export, which has to tokenise and embed as the trained model does. Raises ValueError with what
    differs.
    """
    with atomic_folder(folder) as partial:
        fill(partial, weights, built, heads)


def fill(folder: Path, weights: dict[str, Tensor], built: ClipModel, heads: Mapping[str, Any] | None = None) -> None:
    """As `write_model`, into an empty folder."""
    save_file(clip_weights(weights), folder / WEIGHTS_FILE)
    if heads is not None:
        write_heads(folder, weights, heads)
    _write_description(folder, built.description)
    _check_tokenizer(folder, built.description)
    _check_embeddings(folder, weights, built)


def head_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The objectives' heads of a checkpoint, as HEAD.PARAMETER."""
    return {name.removeprefix(_HEADS): value for name, value in weights.items() if name.startswith(_HEADS)}


def write_heads(folder: Path, weights: Mapping[str, Tensor], heads: Mapping[str, Any]) -> None:
    """The objectives' heads of a checkpoint as one file, with `heads`, what is known of each, as JSON in its metadata."""
    save_file(head_weights(weights), folder / HEADS_FILE, {"heads": json.dumps(heads)})


def rehearse(description: ModelSpec) -> None:
    """Write a model's configuration and tokenizer as the end of a run will, and let open_clip read them.

    Raises ValueError with what would differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_description(Path(folder), description)
        _check_tokenizer(Path(folder), description)


def _write_description(folder: Path, description: ModelSpec) -> None:
    """open_clip's configuration of a model and its tokenizer's files."""
    config = copy.deepcopy(description.config)
    inner: Any = getattr(description.tokenize, "tokenizer", None)
    if hasattr(inner, "save_pretrained"):
        # With this key, whatever its value, open_clip reads the tokenizer from the folder itself.
        config["text_cfg"]["hf_tokenizer_name"] = config["text_cfg"].get("hf_tokenizer_name") or "in this folder"
        inner.save_pretrained(folder)
    preprocess = _written(complete(description.preprocess, description.config))
    (folder / CLIP_CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1), encoding="utf-8")


def _check_tokenizer(folder: Path, description: ModelSpec) -> None:
    """Raises ValueError where open_clip's tokenizer of the folder gives other tokens than the one that the model is trained with."""
    samples = list(SAMPLES)
    ours, theirs = description.tokenize(samples), open_clip.get_tokenizer(f"local-dir:{folder}")(samples)
    if ours.shape != theirs.shape or not torch.equal(ours, theirs):
        row = 0 if ours.shape != theirs.shape else int((ours != theirs).any(1).nonzero()[0])
        raise ValueError(
            f"{description.role}: exported as open_clip reads it, its tokenizer gives other tokens than in training, first for "
            f"{samples[row][:60]!r}: give the tokenizer as a folder ({description.role}.tokenizer) and its settings in "
            f"text_cfg.tokenizer_kwargs"
        )


def _check_embeddings(folder: Path, weights: dict[str, Tensor], built: ClipModel) -> None:
    """Raises ValueError where the model that open_clip loads from the folder embeds or prepares images otherwise than the trained one."""
    description = built.description
    with torch.random.fork_rng(devices=[]):
        ours: Any = clip.build(description, torch.device("cpu"), load_weights=False).clip.eval()
        load_clip(ours, weights)
        theirs: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    expected = _written(built.preprocess)
    loaded = {key: theirs.visual.preprocess_cfg[key] for key in expected}
    if any(_as_list(loaded[key]) != _as_list(expected[key]) for key in expected):
        raise ValueError(f"{folder}: open_clip prepares images with {loaded}, and the model was trained with {expected}")
    height, width = image_size(ours.visual)
    pixels = torch.linspace(-2, 2, 2 * 3 * height * width).reshape(2, 3, height, width).sin()
    tokens = description.tokenize(list(SAMPLES[:4]))
    with torch.no_grad():
        pairs = {
            "image": (ours.encode_image(pixels), theirs.encode_image(pixels)),
            "text": (ours.encode_text(tokens), theirs.encode_text(tokens)),
            "scale": (ours.logit_scale.reshape(-1), theirs.logit_scale.reshape(-1)),
        }
    for name, (trained, exported) in pairs.items():
        if not torch.allclose(trained, exported, rtol=1e-4, atol=1e-6, equal_nan=True):
            worst = float((trained - exported).abs().max())
            raise ValueError(
                f"{folder}: loaded by open_clip, the exported model's {name} differs by {worst:.2g} from the trained one's; the run's "
                f"checkpoints are sound, and `megakd evaluate` scores them"
            )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _written(preprocess: PreprocessCfg) -> dict[str, Any]:
    """What open_clip_config.json holds of the preprocessing: all but the size, which is the image tower's."""
    return {key: getattr(preprocess, key) for key in (*KEYS, "fill_color")}
