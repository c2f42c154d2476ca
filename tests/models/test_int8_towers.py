"""Whole models of two blocks a tower, of every kind that the giants have and of open_clip's other kinds, in 8 bits against float32."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import CustomTransformer
from safetensors.torch import load_file, save_file
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.int8.convert import matrices, parts_of, quantise, quantise_weight, sources
from megakd.models.int8.linear import Int8Linear
from megakd.models.int8.migration import Originals, Reference, migrate
from megakd.models.weights import InMemory
from megakd.runtime.launch import World
from megakd.runtime.zero3 import overwrite
from support.teachers import known_settings, timm_tower

ROWS, TOKENS, WORDS, END, PIXELS = 3, 16, 200, 199, 56
TEXT = {"context_length": TOKENS, "vocab_size": WORDS, "width": 128, "heads": 2, "layers": 2}
VIT = {"image_size": PIXELS, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14}


@register_model
def megakd_int8_eva02_enormous(pretrained: bool = False, **settings: Any) -> nn.Module:
    return _shrunk("eva02_enormous_patch14_clip_224", settings, embed_dim=224, num_heads=2)


@register_model
def megakd_int8_pe_core_gigantic(pretrained: bool = False, **settings: Any) -> nn.Module:
    return _shrunk("vit_pe_core_gigantic_patch14_448", settings, embed_dim=192, num_heads=2, attn_pool_num_heads=2, ref_feat_shape=(4, 4))


@register_model
def megakd_int8_giantopt_siglip(pretrained: bool = False, **settings: Any) -> nn.Module:
    return _shrunk("vit_giantopt_patch16_siglip_384", settings, embed_dim=192, num_heads=2, patch_size=14)


@register_model
def megakd_int8_convnext(pretrained: bool = False, **settings: Any) -> nn.Module:
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 32, 48, 64), conv_mlp=False, **settings)


@register_model
def megakd_int8_convnext_of_convolutions(pretrained: bool = False, **settings: Any) -> nn.Module:
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 32, 48, 64), conv_mlp=True, **settings)


def _shrunk(name: str, settings: dict[str, Any], **narrow: Any) -> nn.Module:
    """timm's own function for the giant, with other widths: its choice of blocks stays."""
    return timm.create_model(name, img_size=PIXELS, depth=2, **narrow, **known_settings(settings))


def _timm(name: str, pool: str, proj: str | None) -> dict[str, Any]:
    return timm_tower(name, pool, proj, PIXELS)


def _config(vision: dict[str, Any], text: dict[str, Any] = TEXT, **more: Any) -> dict[str, Any]:
    return {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text, **more}


SIGLIP_TEXT = {
    **{**TEXT, "width": 144, "mlp_ratio": 3.7362, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    **{"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}},
}
# By open_clip's name of the giant: its configuration with other widths.
GIANTS: dict[str, dict[str, Any]] = {
    "ViT-H-14": _config(VIT),
    "ViT-H-14-378-quickgelu": _config(VIT, quick_gelu=True),
    "ViT-bigG-14": _config({**VIT, "width": 208, "head_width": 104, "mlp_ratio": 4.9231}),
    "EVA02-E-14-plus": _config(_timm("megakd_int8_eva02_enormous", "token", None), custom_text=True),
    "PE-Core-bigG-14-448": _config(_timm("megakd_int8_pe_core_gigantic", "map", None), custom_text=True),
    "ViT-gopt-16-SigLIP2-384": {
        **_config(_timm("megakd_int8_giantopt_siglip", "map", "none"), SIGLIP_TEXT, init_logit_bias=-10, custom_text=True),
        "embed_dim": 192,
    },
}
POOLED = {**VIT, "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "patch_size": None}
HF_TEXT = {"hf_model_name": "FOLDER", "hf_tokenizer_name": "FOLDER", "hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"}
OTHERS: dict[str, dict[str, Any]] = {
    "pooled by attention, text with a class token": _config(POOLED, {**TEXT, "embed_cls": True}, custom_text=True),
    "custom blocks": _config(VIT),
    "ConvNeXt": _config(_timm("megakd_int8_convnext", "", "linear")),
    "ConvNeXt of convolutions": _config(_timm("megakd_int8_convnext_of_convolutions", "avg", "mlp")),
    "ResNet": _config(RESNET),
    "text of transformers": _config(VIT, HF_TEXT),
}
KINDS = {**GIANTS, **OTHERS}
XLM_ROBERTA = {
    **{"model_type": "xlm-roberta", "hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 96},
    **{"vocab_size": WORDS, "max_position_embeddings": 40, "type_vocab_size": 1, "pad_token_id": 0},
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], nn.Module]:
    """By kind, with random weights whose norms and biases are not 0 and 1, so that a mistake with them shows."""
    folder = tmp_path_factory.mktemp("xlm")
    (folder / "config.json").write_text(json.dumps(XLM_ROBERTA), encoding="utf-8")

    def build(kind: str) -> nn.Module:
        config = copy.deepcopy(KINDS[kind])
        custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
        if "hf_model_name" in config["text_cfg"]:
            config["text_cfg"] |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
        torch.manual_seed(5)
        clip = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
        if kind == "custom blocks":
            clip.transformer = CustomTransformer(TEXT["width"], TEXT["layers"], TEXT["heads"])
        for parameter in clip.eval().requires_grad_(False).parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        return clip

    return build


def _inputs(clip: nn.Module) -> tuple[Tensor, Tensor]:
    """Pixels and tokens with an end of text, the largest number, then zeros."""
    generator = torch.Generator().manual_seed(1)
    size = clip.visual.image_size
    pixels = torch.randn(ROWS, 3, *(size if isinstance(size, tuple) else (size, size)), generator=generator)
    tokens = torch.randint(1, END, (ROWS, TOKENS), generator=generator)
    for row, length in enumerate((3, 9, TOKENS - 1)):
        tokens[row, length] = END
        tokens[row, length + 1 :] = 0
    return pixels, tokens


def _outputs(clip: nn.Module, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return clip.encode_image(pixels), clip.encode_text(tokens)


def _widen(clip: nn.Module, converted: nn.Module) -> None:
    """Round the matrices that were converted, and no others, to 8 bits in the original."""
    state = clip.state_dict()
    for source in sources(converted).values():
        if source.part == "weight":
            codes, scale = quantise_weight(state[source.tensor])
            state[source.tensor].copy_((codes * scale[:, None]).view_as(state[source.tensor]))


@pytest.mark.parametrize("kind", KINDS)
def test_int8_embeddings_have_a_cosine_of_999_thousandths_with_float32_ones(kind: str, build: Callable[[str], nn.Module]) -> None:
    clip = build(kind)
    given = _inputs(clip)
    expected = _outputs(clip, *given)
    for way in ("dequantise", "int_mm", "bitsandbytes"):
        converted = copy.deepcopy(clip)
        quantise(converted, product=way)
        for found, exact in zip(_outputs(converted, *given), expected, strict=True):
            assert not torch.equal(found, exact)
            assert F.cosine_similarity(found, exact).min() >= 0.999, way


@pytest.mark.parametrize("kind", KINDS)
def test_outliers_of_every_kind_move_into_its_weights(kind: str, build: Callable[[str], nn.Module]) -> None:
    """With the original matrices the model is what it was, also where a matrix is called in thirds or over channels."""
    clip = build(kind)
    given, expected = _inputs(clip), _outputs(clip, *_inputs(clip))
    state = clip.state_dict()
    converted = copy.deepcopy(clip)
    quantise(converted, product="int_mm", migrated=True)
    names = matrices(converted)
    originals = Originals(names, lambda: InMemory(state, kind), World(0, 1, torch.device("cpu")))
    with Reference(originals) as reference:
        reference.noting = True
        for found, exact in zip(_outputs(converted, *given), expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)
    migrate(originals, reference.largest, overwrite)
    assert set(names) == set(reference.largest)
    for found, exact in zip(_outputs(converted, *given), expected, strict=True):
        assert F.cosine_similarity(found, exact).min() >= 0.9985
    assert converted.state_dict().keys() == sources(converted).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_rounding_of_matrices_differs(kind: str, build: Callable[[str], nn.Module]) -> None:
    clip = build(kind)
    converted = copy.deepcopy(clip)
    quantise(converted, product="dequantise")
    _widen(clip, converted)
    given = _inputs(clip)
    for found, exact in zip(_outputs(converted, *given), _outputs(clip, *given), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", GIANTS)
def test_a_tower_in_bf16_stays_in_bf16_and_near_float32(kind: str, build: Callable[[str], nn.Module]) -> None:
    clip = build(kind)
    pixels, tokens = _inputs(clip)
    expected = _outputs(clip, pixels, tokens)
    for first in (True, False):
        narrow = copy.deepcopy(clip)
        if first:
            narrow = narrow.bfloat16()
        quantise(narrow)
        for found, exact in zip(_outputs(narrow.bfloat16(), pixels.bfloat16(), tokens), expected, strict=True):
            assert found.dtype == torch.bfloat16
            assert F.cosine_similarity(found.float(), exact).min() >= 0.999


@pytest.mark.parametrize("kind", [kind for kind in GIANTS if kind != "ViT-gopt-16-SigLIP2-384"])
def test_what_follows_the_end_of_a_text_cannot_reach_its_embedding(kind: str, build: Callable[[str], nn.Module]) -> None:
    clip = build(kind)
    quantise(clip)
    pixels, tokens = _inputs(clip)
    changed = tokens.clone()
    changed[0, 5:] = 7  # after its end, which is at 3
    earlier = tokens.clone()
    earlier[0, 1] = 1 + tokens[0, 1] % 100
    expected = _outputs(clip, pixels, tokens)[1]
    torch.testing.assert_close(_outputs(clip, pixels, changed)[1], expected)
    assert (_outputs(clip, pixels, earlier)[1] - expected)[0].abs().max() > 1e-3


def test_padding_of_a_text_of_transformers_is_ignored(build: Callable[[str], nn.Module]) -> None:
    clip = build("text of transformers")
    quantise(clip)
    tokens = _inputs(clip)[1]
    with torch.inference_mode():
        torch.testing.assert_close(clip.encode_text(tokens)[:1], clip.encode_text(tokens[:1, :4]))


@pytest.mark.parametrize("kind", KINDS)
def test_sources_make_the_converted_models_state_bit_for_bit(kind: str, build: Callable[[str], nn.Module]) -> None:
    clip = build(kind)
    originals = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    quantise(clip)
    state, made_of = clip.state_dict(), sources(clip)
    assert made_of.keys() == state.keys()
    assert {source.tensor for source in made_of.values()} == originals.keys()
    for name, source in made_of.items():
        made = parts_of(originals[source.tensor], [source.part])[source.part]
        assert made.dtype == state[name].dtype
        assert torch.equal(made, state[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_on_meta_has_the_names_types_and_shapes_of_a_real_one(kind: str, build: Callable[[str], nn.Module]) -> None:
    clip = build(kind)
    empty = copy.deepcopy(clip).to("meta")
    assert quantise(empty).fraction == quantise(clip).fraction
    described = [{name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} for model in (empty, clip)]
    assert described[0] == described[1]
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    assert sources(empty) == sources(clip)
    assert not any(parameter.requires_grad for parameter in clip.parameters() if parameter.dtype == torch.int8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_goes_through_safetensors(kind: str, build: Callable[[str], nn.Module], tmp_path: Path) -> None:
    clip = build(kind)
    quantise(clip)
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, tmp_path / "int8.safetensors")
    other = build(kind).to("meta")
    quantise(other)
    other.load_state_dict(load_file(tmp_path / "int8.safetensors"), assign=True)
    written = clip.state_dict()
    assert all(tensor.dtype == written[name].dtype and torch.equal(tensor, written[name]) for name, tensor in other.state_dict().items())
    again = build(kind)  # not on meta, where buffers that no file has would stay
    quantise(again)
    again.load_state_dict(load_file(tmp_path / "int8.safetensors"))
    for output, before in zip(_outputs(again, *_inputs(clip)), _outputs(clip, *_inputs(clip)), strict=True):
        assert torch.equal(output, before)
    assert {module.scale.dtype for module in other.modules() if isinstance(module, Int8Linear)} == {torch.float32}
