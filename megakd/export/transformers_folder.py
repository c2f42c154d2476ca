"""`--to transformers`: CLIPModel, SiglipModel or their image half, with processor and tokenizer, loaded again and compared before it stays.

Legend: n images or texts, D embedding width.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor

from megakd.data.transforms import input_size
from megakd.export import transformers_tokens as tokens_of
from megakd.export.options import Options
from megakd.export.transformers_layers import NotMapped, Part
from megakd.export.transformers_towers import text_part, vision_part
from megakd.export.trial_inputs import CLOSE, cosines, difference, pictures, pixels, texts, tokens
from megakd.models.clip import ClipModel

_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Mapped:
    """A model of transformers. name: of its class. model: of it, with the weights. tokenizer: None for an image half."""

    name: str
    model: Any
    tokenizer: Any
    context: int
    end: int


def fill(folder: Path, built: ClipModel, options: Options) -> list[str]:
    """Write the model into an empty folder, load it again with transformers and compare. Gives lines for people.

    Raises ValueError with the layer that transformers has not, and with what differs.
    """
    mapped = write(folder, built, options.part)
    return [f"transformers' {mapped.name}", *check(folder, built, mapped)]


def write(folder: Path, built: ClipModel, part: str) -> Mapped:
    """The model's files in an empty folder. part: both, image. Raises ValueError with the layer that transformers has not."""
    try:
        mapped = _mapped(built, part)
        processor = image_processor(built.preprocess)
    except NotMapped as error:
        half = "" if part == "image" else "; `--part image` takes the image tower alone, where that maps"
        raise ValueError(
            f"--to transformers: the model has no class there: {error}{half}; `--to open_clip` takes any pair of towers, `--to onnx` any "
            f"model"
        ) from error
    mapped.model.save_pretrained(folder)
    if mapped.tokenizer is None:
        processor.save_pretrained(folder)
        return mapped
    joined: Any = transformers.CLIPProcessor if mapped.name == "CLIPModel" else transformers.SiglipProcessor
    joined(image_processor=processor, tokenizer=mapped.tokenizer).save_pretrained(folder)
    bias: Any = getattr(built.clip, "logit_bias", None)
    if mapped.name == "CLIPModel" and bias is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"logit_bias": float(bias)}
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return mapped


def _mapped(built: ClipModel, wanted: str) -> Mapped:
    clip: Any = built.clip
    image = vision_part(clip.visual)
    if wanted == "image":
        return _half(image)
    tokenize, context = built.description.tokenize, built.description.context_length
    end = -1
    if built.description.has_text:
        words = built.description.config["text_cfg"]
        end = tokens_of.end_token(tokens(built.description), words.get("pool_type", "argmax"), words.get("eos_id", 2))
    text = text_part(built.clip, end)
    if image.kind != text.kind:
        classes = {"clip": "CLIPModel", "siglip": "SiglipModel"}
        raise NotMapped(f"its image tower is {classes[image.kind]}'s and its text tower {classes[text.kind]}'s, and no class has both")
    tokenizer = tokens_of.of_transformers(tokenize, context, masked=text.kind == "clip")
    scale = clip.logit_scale.detach()
    if scale.numel() != 1:
        raise NotMapped(f"its logit scale has {scale.numel()} numbers")
    joined = {f"vision_model.{name}": value for name, value in image.state.items()}
    joined |= {f"text_model.{name}": value for name, value in text.state.items()}
    text.settings |= {"bos_token_id": _known(tokenizer.bos_token_id), "pad_token_id": _known(tokenizer.pad_token_id)}
    text.settings.setdefault("eos_token_id", _known(tokenizer.eos_token_id))
    if text.kind == "clip":
        assert image.head is not None
        assert text.head is not None
        width = image.head.shape[0]
        joined |= {"visual_projection.weight": image.head, "text_projection.weight": text.head, "logit_scale": scale.reshape(())}
        of_both: dict[str, Any] = {"projection_dim": width, "logit_scale_init_value": float(scale)}
        config: Any = transformers.CLIPConfig(
            text_config=text.settings | {"projection_dim": width}, vision_config=image.settings | {"projection_dim": width}, **of_both
        )
        model: Any = transformers.CLIPModel(config)
    else:
        bias: Any = getattr(built.clip, "logit_bias", None)
        shift = torch.zeros(1) if bias is None else bias.detach().reshape(1)
        joined |= {"logit_scale": scale.reshape(1), "logit_bias": shift}
        config = transformers.SiglipConfig(text_config=text.settings, vision_config=image.settings)
        model = transformers.SiglipModel(config)
    model.load_state_dict(joined)
    return Mapped(type(model).__name__, model.eval(), tokenizer, context, end)


def _half(image: Part) -> Mapped:
    model: Any
    if image.kind == "clip":
        assert image.head is not None
        config = transformers.CLIPVisionConfig(**image.settings, projection_dim=image.head.shape[0])
        model = transformers.CLIPVisionModelWithProjection(config)
        state = {f"vision_model.{name}": value for name, value in image.state.items()}
        model.load_state_dict(state | {"visual_projection.weight": image.head})
    else:
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**image.settings))
        model.load_state_dict(image.state)
    return Mapped(type(model).__name__, model.eval(), None, 0, -1)


def _known(token: int | None) -> int | None:
    return None if token is None else int(token)


def image_processor(preprocess: PreprocessCfg) -> Any:
    """transformers' class of a preprocessing. Raises NotMapped for images that are padded."""
    height, width = input_size(preprocess)
    resample = _RESAMPLE["bilinear" if preprocess.interpolation == "bilinear" else "bicubic"]
    shared: dict[str, Any] = {"image_mean": list(preprocess.mean), "image_std": list(preprocess.std), "resample": resample}
    if preprocess.resize_mode == "squash":
        return transformers.SiglipImageProcessor(size={"height": height, "width": width}, **shared)
    if preprocess.resize_mode == "longest":
        raise NotMapped("its images are resized by the longer side and padded (resize_mode = 'longest'), which no image processor does")
    return transformers.CLIPImageProcessor(size={"shortest_edge": height}, crop_size={"height": height, "width": width}, **shared)


def _settings(processor: Any) -> dict[str, Any]:
    """How an image processor prepares images, in plain numbers."""
    plain = ("resample", "do_center_crop", "rescale_factor")
    found: dict[str, Any] = {name: getattr(processor, name, None) for name in plain}
    found |= {name: dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size")}
    return found | {name: tuple(getattr(processor, name)) for name in ("image_mean", "image_std")}


def _bias(built: ClipModel, name: str) -> list[str]:
    """What is to be said of a logit bias, which CLIPModel has not: the number is kept in its config.json."""
    bias: Any = getattr(built.clip, "logit_bias", None)
    if name == "SiglipModel":
        return ["it has no logit bias, and SiglipModel's is 0"] if bias is None else []
    if bias is None:
        return []
    return [
        f"its logit bias {float(bias):.4g} has no place in CLIPModel: add config.logit_bias to the logits for a sigmoid's probabilities"
    ]


def use(folder: Path, name: str) -> str:
    """Python that loads a folder that was written here."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    if not (folder / "tokenizer_config.json").is_file():
        output = "image_embeds" if kind.startswith("CLIP") else "pooler_output"
        return f"""
from transformers import AutoImageProcessor, {kind}
model = {kind}.from_pretrained("{name}")
processor = AutoImageProcessor.from_pretrained("{name}")
embeddings = model(**processor(images=[image], return_tensors="pt")).{output}
"""
    return f"""
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
inputs = processor(text=["a photo of a dog"], images=[image], padding="max_length", truncation=True, return_tensors="pt")
logits = model(**inputs).logits_per_image
"""


def load(folder: Path) -> tuple[Any, Any]:
    """Model and processor of a folder, as a user loads them: by the class that config.json names, and by AutoProcessor."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind: Any = getattr(transformers, config["architectures"][0])
    auto: Any = transformers.AutoProcessor if (folder / "tokenizer_config.json").is_file() else transformers.AutoImageProcessor
    model, found = kind.from_pretrained(folder, output_loading_info=True)
    if any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError(f"{folder}: transformers does not find all weights: {found}")
    return model.eval(), auto.from_pretrained(folder)


@torch.no_grad()
def image_features(model: Any, pixels: Tensor) -> Tensor:
    """(n, D) of (n, 3, H, W), of any of the classes that are written here."""
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=pixels).pooler_output  # type: ignore[no-any-return]
    output = model(pixel_values=pixels)
    return output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output  # type: ignore[no-any-return]


@torch.no_grad()
def check(folder: Path, built: ClipModel, mapped: Mapped) -> list[str]:
    """Lines for people on how what transformers reads from the folder compares with the model. Raises ValueError with what differs."""
    model, processor = load(folder)
    prepares = getattr(processor, "image_processor", processor)
    for key, value in _settings(image_processor(built.preprocess)).items():
        if (found := _settings(prepares)[key]) != value:
            raise ValueError(f"{folder}: transformers prepares images with {key} = {found}, and the model was trained with {value}")
    clip: Any = built.clip
    images, ours = pictures(), pixels(built)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = processor(images=images, return_tensors="pt")["pixel_values"]
    if ours.shape != theirs.shape:
        raise ValueError(f"{folder}: transformers prepares images of {tuple(theirs.shape)}, and the model's are {tuple(ours.shape)}")
    own = clip.encode_image(ours)
    worst = _same(folder, "image embeddings", own, image_features(model, ours))
    std = torch.tensor(built.preprocess.std).view(3, 1, 1)
    levels = ((ours - theirs) * std * 255).abs()
    cosine = float(cosines(own, image_features(model, theirs)).min())
    lines = [
        f"image embeddings of equal pixels differ by {worst:.1g} at most ({len(images)} pictures)",
        f"its processor's pixels differ by {float(levels.mean()):.2f} of 255 levels in the mean, {float(levels.max()):.0f} at most; "
        f"least cosine of the embeddings {cosine:.5f}",
    ]
    if mapped.tokenizer is None:
        return lines
    return [*lines, *_check_texts(folder, built, mapped, model, processor), *_bias(built, mapped.name)]


def _check_texts(folder: Path, built: ClipModel, mapped: Mapped, model: Any, processor: Any) -> list[str]:
    clip: Any = built.clip
    tokenize: Any = built.description.tokenize
    samples = texts()

    def theirs_of(given: Sequence[str]) -> Any:
        return processor(text=list(given), padding="max_length", truncation=True, max_length=mapped.context, return_tensors="pt")

    ours, clean, raw = tokens(built.description), tokens_of.cleaned(tokenize, samples), theirs_of(samples)["input_ids"]
    encoded = theirs_of(clean)
    end = mapped.end
    if mapped.name == "CLIPModel":  # what follows the end token is not seen
        own, read = ([tokens_of.until_end(row, end) for row in ids] for ids in (ours, encoded["input_ids"]))
        unclean = [tokens_of.until_end(row, end) for row in raw]
    else:
        own, read, unclean = ours.tolist(), encoded["input_ids"].tolist(), raw.tolist()
    if other := [text for text, one, two in zip(samples, own, read, strict=True) if one != two]:
        raise ValueError(f"{folder}: transformers' tokenizer gives other tokens than the model's, first for {other[0][:60]!r}")
    worst = _same(folder, "text embeddings", clip.encode_text(ours), model.get_text_features(**encoded).pooler_output)
    scale = float((clip.logit_scale.detach().reshape(()) - model.logit_scale.reshape(())).abs())
    if scale > CLOSE:
        raise ValueError(f"{folder}: the logit scale differs by {scale:.2g}")
    lines = [f"tokens are equal, text embeddings differ by {worst:.1g} at most ({len(samples)} texts)"]
    if changed := [text for text, one, two in zip(samples, own, unclean, strict=True) if one != two]:
        lines.append(
            f"{len(changed)} of {len(samples)} sample texts need open_clip's cleaning before transformers' tokenizer (ftfy, white space, "
            f"case or punctuation), for example {changed[0][:40]!r}"
        )
    if mapped.name == "SiglipModel":
        lines.append("texts must be padded to the whole context (padding='max_length'), as they were in training")
    return lines


def _same(folder: Path, what: str, ours: Tensor, theirs: Tensor) -> float:
    worst = difference(ours, theirs)
    if worst > CLOSE:
        raise ValueError(f"{folder}: loaded by transformers, the {what} differ by {worst:.2g}, more than {CLOSE:g}; nothing is exported")
    return worst
