"""A trained model as a folder that open_clip loads: `open_clip.create_model_and_transforms("local-dir:RUN/model")`."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megakd.models import clip
from megakd.models.clip import ClipModel, ModelSpec
from megakd.models.preprocessing import complete
from megakd.models.student import SCALARS
from megakd.models.tokenizing import SAMPLES
from megakd.recipe.chain import CLIP_CONFIG
from megakd.runtime.files import atomic_folder

# Of a run folder, what a finished run leaves of its student.
MODEL = "model"
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


def write_model(folder: Path, weights: dict[str, Tensor], built: ClipModel) -> None:
    """Write configuration, fp32 weights and tokenizer. An earlier export in `folder` is replaced as a whole.

    Before it gets its name the export is loaded by open_clip, and has to tokenise and embed as the trained model does. Raises ValueError
    with what differs.
    """
    with atomic_folder(folder) as partial:
        save_file(clip_weights(weights), partial / WEIGHTS_FILE)
        _write_description(partial, built.description)
        _check_tokenizer(partial, built.description)
        _check_embeddings(partial, weights, built)


def rehearse(description: ModelSpec) -> None:
    """Try what the end of a run will need of a model's description: its tokenizer and preprocessing written, and read by open_clip.

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
        # open_clip reads a tokenizer from the folder itself as soon as this key is there, whatever it says.
        config["text_cfg"]["hf_tokenizer_name"] = config["text_cfg"].get("hf_tokenizer_name") or "in this folder"
        inner.save_pretrained(folder)
    preprocess = complete(description.preprocess, description.config)
    content: dict[str, Any] = {"model_cfg": config, "preprocess_cfg": _plain(preprocess)}
    (folder / CLIP_CONFIG).write_text(json.dumps(content, indent=1), encoding="utf-8")


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
    """Raises ValueError where open_clip makes of the folder another model than the trained one, or prepares images otherwise."""
    description = built.description
    with torch.random.fork_rng(devices=[]):
        ours: Any = clip.build(description, torch.device("cpu"), load_weights=False).clip.eval()
        load_clip(ours, weights)
        theirs: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    expected = _plain(built.preprocess)
    found = {key: theirs.visual.preprocess_cfg[key] for key in expected}
    if {key: _listed(value) for key, value in found.items()} != {key: _listed(value) for key, value in expected.items()}:
        raise ValueError(f"{folder}: open_clip prepares images with {found}, and the model was trained with {expected}")
    size = built.preprocess.size
    height, width = (size, size) if isinstance(size, int) else size
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


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _plain(preprocess: Any) -> dict[str, Any]:
    return {key: preprocess.__dict__[key] for key in ("mean", "std", "interpolation", "resize_mode", "fill_color")}
