"""Students as transformers loads them: the same embeddings and tokens, or a refusal that names the layer which is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from megakd.export import command, transformers_folder
from megakd.export.options import Options
from megakd.export.source import Source
from megakd.export.trial_inputs import pixels
from megakd.models import clip
from megakd.recipe import Model, Preprocess
from support import edit_json

TEXT: dict[str, Any] = {"context_length": 32, "vocab_size": 128, "width": 32, "heads": 2, "layers": 2}
NATIVE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": TEXT,
}
SIGLIP_TEXT = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}


def _vit(name: str, **settings: Any) -> VisionTransformer:
    return timm.models.build_model_with_cfg(VisionTransformer, name, pretrained=False, **settings)  # type: ignore[no-any-return]


@register_model
def tiny_siglip(pretrained: bool = False, **more: Any) -> VisionTransformer:
    """As timm's vit_base_patch16_siglip_224 is made, with smaller numbers."""
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False}
    return _vit("tiny_siglip", **{**small, "global_pool": "map", **more})


@register_model
def tiny_clip(pretrained: bool = False, **more: Any) -> VisionTransformer:
    """As timm's vit_base_patch32_clip_224 is made, with smaller numbers."""
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "pre_norm": True}
    return _vit("tiny_clip", **{**small, **more})


@register_model
def tiny_vit(pretrained: bool = False, **more: Any) -> VisionTransformer:
    """As timm's vit_tiny_patch16_224 is made, with smaller numbers."""
    return _vit("tiny_vit", **{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, **more})


def _timm(name: str, **vision: Any) -> dict[str, Any]:
    return {**NATIVE, "vision_cfg": {"image_size": 32, "timm_model_name": name, **vision}}


SIGLIP = {**_timm("tiny_siglip", timm_pool="map", timm_proj="none"), "embed_dim": 32, "init_logit_bias": -7.0, "text_cfg": SIGLIP_TEXT}


def _built(world: Path | None, architecture: dict[str, Any], **more: Any) -> clip.ClipModel:
    torch.manual_seed(0)
    tokenizer = {} if world is None else {"tokenizer": str(world / "tokenizer")}
    built = clip.build(clip.resolve(Model(architecture=architecture, **tokenizer, **more), "student"), torch.device("cpu"))
    for name, value in built.clip.named_parameters():  # norms and biases that are 1 and 0 would hide an exchange
        if value.ndim < 2 and name not in ("logit_scale", "logit_bias"):
            torch.nn.init.normal_(value, 1.0 if "weight" in name else 0.0, 0.2)
    built.clip.eval().requires_grad_(False)
    return built


MAPPED = {
    "native": (NATIVE, "CLIPModel"),
    "native with QuickGELU and a bias": ({**NATIVE, "quick_gelu": True, "init_logit_bias": -3.0}, "CLIPModel"),
    "native, custom text": ({**NATIVE, "custom_text": True, "text_cfg": {**TEXT, "pool_type": "argmax"}}, "CLIPModel"),
    "timm's ViT of CLIP": (_timm("tiny_clip", timm_pool="token"), "CLIPModel"),
    "SigLIP": (SIGLIP, "SiglipModel"),
    "SigLIP without a bias": ({key: value for key, value in SIGLIP.items() if key != "init_logit_bias"}, "SiglipModel"),
}


@pytest.mark.parametrize("name", MAPPED)
def test_transformers_gives_the_students_embeddings_and_logits(name: str, world: Path, tmp_path: Path) -> None:
    architecture, kind = MAPPED[name]
    built = _built(world, architecture)
    told = transformers_folder.fill(tmp_path, built, Options())
    assert told[0] == f"transformers' {kind}"
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    texts = ["a red circle", "two blue squares and a small green ring", "a"]
    given = processor(text=texts, padding="max_length", truncation=True, return_tensors="pt")
    assert type(model).__name__ == kind
    assert given["input_ids"].shape == (3, 32), "the context is in the tokenizer's files"
    ours: Any = built.clip
    with torch.no_grad():
        image = F.normalize(ours.encode_image(pixels(built)), dim=-1)
        text = F.normalize(ours.encode_text(built.description.tokenize(texts)), dim=-1)
        logits = ours.logit_scale.exp() * image @ text.T
        if kind == "SiglipModel" and ours.logit_bias is not None:
            logits = logits + ours.logit_bias
        theirs = model(**given, pixel_values=pixels(built))
    torch.testing.assert_close(theirs.logits_per_image, logits, rtol=1e-4, atol=1e-4)
    if name == "native with QuickGELU and a bias":
        assert json.loads((tmp_path / "config.json").read_text())["logit_bias"] == -3.0
        assert any("logit bias -3" in line for line in told)


def test_clips_own_tokenizer_becomes_transformers_own(tmp_path: Path) -> None:
    built = _built(None, {**NATIVE, "text_cfg": {"width": 32, "heads": 2, "layers": 1}})
    transformers_folder.fill(tmp_path, built, Options())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__.startswith("CLIPTokenizer")
    assert tokenizer("A photo of a dog!")["input_ids"] == [49406, 320, 1125, 539, 320, 1929, 256, 49407]


HALVES = {
    "native": (NATIVE, "CLIPVisionModelWithProjection"),
    "beside a text tower that does not map": (
        {**NATIVE, "custom_text": True, "text_cfg": {**TEXT, "pool_type": "last"}},
        "CLIPVisionModelWithProjection",
    ),
    "SigLIP": (SIGLIP, "SiglipVisionModel"),
}


@pytest.mark.parametrize("name", HALVES)
def test_the_image_half_alone(name: str, world: Path, tmp_path: Path) -> None:
    architecture, kind = HALVES[name]
    built = _built(world, architecture)
    assert transformers_folder.fill(tmp_path, built, Options(part="image"))[0] == f"transformers' {kind}"
    model, processor = transformers_folder.load(tmp_path)
    ours: Any = built.clip
    torch.testing.assert_close(
        transformers_folder.image_features(model, pixels(built)), ours.encode_image(pixels(built)), rtol=1e-4, atol=1e-5
    )
    assert processor.size
    assert not (tmp_path / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        (_timm("convnext_atto"), "ConvNeXt"),
        (_timm("tiny_vit", timm_pool="token"), "no norm before its blocks"),
        (_timm("tiny_clip", timm_pool="avg"), "pools by avg"),
        (_timm("tiny_clip", timm_pool="token", timm_proj="mlp"), "Mlp"),
        (_timm("tiny_siglip", timm_pool="map"), "projected after it"),
        ({**NATIVE, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}}, "ModifiedResNet"),
        ({**NATIVE, "vision_cfg": {**NATIVE["vision_cfg"], "no_ln_pre": True}}, "no_ln_pre"),
        ({**NATIVE, "vision_cfg": {**NATIVE["vision_cfg"], "pool_type": "avg"}}, "pools by avg"),
        ({**NATIVE, "vision_cfg": {**NATIVE["vision_cfg"], "ls_init_value": 0.1}}, "LayerScale"),
        ({**NATIVE, "vision_cfg": {**NATIVE["vision_cfg"], "image_size": [32, 64]}}, "squares"),
        ({**NATIVE, "custom_text": True, "text_cfg": {**TEXT, "pool_type": "last"}}, "causal and pools by 'last'"),
        ({**SIGLIP, "text_cfg": TEXT}, "no class has both"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_transformers_has_not_is_refused_by_name(architecture: dict[str, Any], told: str, world: Path, tmp_path: Path) -> None:
    built = _built(world, architecture)
    with pytest.raises(ValueError, match=r"--to transformers: .*`--to onnx` any model") as refused:
        transformers_folder.fill(tmp_path, built, Options())
    assert told in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "architecture",
    [_timm("convnext_atto"), _timm("tiny_vit", timm_pool="token"), _timm("tiny_clip", timm_pool="avg"), SIGLIP],
    ids=["ConvNeXt", "timm's ViT", "timm's ViT of CLIP, averaged", "SigLIP"],
)
def test_open_clip_takes_these_too(architecture: dict[str, Any], world: Path, tmp_path: Path) -> None:
    built = _built(world, architecture)
    weights = {f"clip.{name}": value for name, value in built.clip.state_dict().items()}
    assert command.export(Source("a student", built, weights), "open_clip", tmp_path / "out", Options())[0].startswith("open_clip loads it")
    theirs: Any = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    ours: Any = built.clip
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_image(pixels(built)), ours.encode_image(pixels(built)), rtol=1e-5, atol=1e-5)


def test_images_are_prepared_as_the_student_was_trained(world: Path, tmp_path: Path) -> None:
    way = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation="bilinear", resize_mode="squash")
    transformers_folder.fill(tmp_path, _built(world, NATIVE, preprocess=way), Options())
    processor = transformers.AutoProcessor.from_pretrained(tmp_path).image_processor
    assert (*processor.image_mean, *processor.image_std, int(processor.resample)) == (0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 2)
    assert dict(processor.size) == {"height": 32, "width": 32}
    with pytest.raises(ValueError, match="padded"):
        transformers_folder.fill(tmp_path / "b", _built(world, NATIVE, preprocess=Preprocess(resize_mode="longest")), Options())


def _rescaled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["vision_model.encoder.layers.1.mlp.fc2.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _other_words(folder: Path) -> None:
    def exchange(content: Any) -> None:
        words = content["model"]["vocab"]
        words["red"], words["blue"] = words["blue"], words["red"]

    edit_json(folder / "tokenizer.json", exchange)


def _edit(file: str, table: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / file, lambda content: content[table].update(values))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_rescaled, "image embeddings differ"),
        (_other_words, "other tokens than the model's, first for"),
        (_edit("config.json", "vision_config", hidden_act="gelu"), "image embeddings differ"),
        (_edit("config.json", "text_config", hidden_act="gelu"), "text embeddings differ"),
        (_edit("processor_config.json", "image_processor", image_mean=[0.5, 0.5, 0.5]), "prepares images with image_mean"),
    ],
    ids=["weights", "tokenizer", "image activation", "text activation", "mean"],
)
def test_what_transformers_reads_otherwise_is_refused(harm: Callable[[Path], None], told: str, world: Path, tmp_path: Path) -> None:
    built = _built(world, {**NATIVE, "quick_gelu": True})
    mapped = transformers_folder.write(tmp_path, built, "both")
    transformers_folder.check(tmp_path, built, mapped)
    harm(tmp_path)
    with pytest.raises(ValueError, match=told):
        transformers_folder.check(tmp_path, built, mapped)


def test_weights_are_float32_and_all_there(world: Path, tmp_path: Path) -> None:
    built = _built(world, NATIVE)
    transformers_folder.fill(tmp_path, built, Options())
    written = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float32}
    assert sum(value.numel() for value in written.values()) == sum(value.numel() for value in built.clip.state_dict().values())
