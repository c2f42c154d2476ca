"""Files that other programs wrote give the same embeddings as in those programs, by every way to load them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from megakd.models import clip as clip_models
from megakd.models import streaming
from megakd.runtime.launch import World
from support.teachers import ARCHITECTURES, build, described

HERE = World(0, 1, torch.device("cpu"))
WORDS = 99
TEXT = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": WORDS}
VISION = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 48, "patch_size": 16}
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "patch_size": 16, "width": 48, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": WORDS, "width": 48, "heads": 3, "layers": 2},
}
SIGLIP = {
    **ARCHITECTURES["SigLIP"],
    "text_cfg": {**ARCHITECTURES["SigLIP"]["text_cfg"], "vocab_size": WORDS, "act_kwargs": {"approximate": "tanh"}},
}


def _clip(activation: str) -> CLIPModel:
    ends = {"max_position_embeddings": 24, "eos_token_id": WORDS - 1, "bos_token_id": 0, "pad_token_id": 1}
    text = {**TEXT, **ends, "hidden_act": activation}
    torch.manual_seed(3)
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**VISION, "hidden_act": activation}, projection_dim=32)).eval()


def _siglip() -> SiglipModel:
    """Its image tower in open_clip is timm's, whose GELU is exact in these narrow models."""
    torch.manual_seed(4)
    text = {**TEXT, "max_position_embeddings": 24, "projection_size": 48}
    return SiglipModel(SiglipConfig(text_config=text, vision_config={**VISION, "hidden_act": "gelu"})).eval()


def _noisy(model: nn.Module) -> Any:
    """Norms and biases that are not 1 and 0, so that a mistake with them shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, WORDS - 1, (3, 24), generator=generator)
    tokens[torch.arange(3), torch.tensor([5, 11, 23])] = WORDS - 1
    return torch.randn(3, 3, 48, 48, generator=generator), tokens


def _theirs(model: Any) -> list[Tensor]:
    pixels, tokens = _inputs()
    with torch.no_grad():
        found = model(input_ids=tokens, pixel_values=pixels)
    return [found.image_embeds, found.text_embeds]


def _ours(clip: Any) -> list[Tensor]:
    pixels, tokens = _inputs()
    with torch.no_grad():
        return [nn.functional.normalize(embedding, dim=-1) for embedding in (clip.encode_image(pixels), clip.encode_text(tokens))]


def _loaders(architecture: dict[str, Any], path: Path) -> list[Callable[[], clip_models.ClipModel]]:
    description = described(architecture, str(path))
    return [lambda: clip_models.build(description, HERE.device), lambda: streaming.load(description, HERE, "fp32")]


def _loaded(architecture: dict[str, Any], path: Path) -> list[Any]:
    """The model by each loader."""
    return [load().clip.eval() for load in _loaders(architecture, path)]


def _assert_is_the_narrow_model(path: Path, **more: Any) -> None:
    for clip in _loaded({**ARCHITECTURES["ViT-bigG"], **more}, path):
        assert all(torch.equal(value, STATE[key]) for key, value in clip.state_dict().items())


def _assert_equal(model: Any, architecture: dict[str, Any], path: Path) -> None:
    for clip in _loaded(architecture, path):
        for ours, theirs in zip(_ours(clip), _theirs(model), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5), (ours - theirs).abs().max()
        assert torch.equal(clip.logit_scale.reshape(-1), model.logit_scale.reshape(-1))


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_transformers_clip_gives_its_own_embeddings(activation: str, custom_text: bool, tmp_path: Path) -> None:
    model = _noisy(_clip(activation))
    model.save_pretrained(tmp_path)
    architecture = {**CLIP, "quick_gelu": activation == "quick_gelu", "custom_text": custom_text}
    _assert_equal(model, architecture, tmp_path / "model.safetensors")


def test_transformers_siglip_gives_its_own_embeddings(tmp_path: Path) -> None:
    model = _noisy(_siglip())
    model.save_pretrained(tmp_path)
    architecture = {**SIGLIP, "vision_cfg": {**SIGLIP["vision_cfg"]}}
    _assert_equal(model, architecture, tmp_path / "model.safetensors")
    for clip in _loaded(architecture, tmp_path / "model.safetensors"):
        assert torch.equal(clip.logit_bias.reshape(-1), model.logit_bias.reshape(-1))


@pytest.mark.parametrize("quick", [True, False])
def test_transformers_own_configuration_tells_the_activation(quick: bool, tmp_path: Path) -> None:
    _clip("quick_gelu" if quick else "gelu").save_pretrained(tmp_path)
    for load in _loaders({**CLIP, "quick_gelu": not quick}, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match=r"hidden_act = .*quick_gelu = (true|false)"):
            load()


def test_an_attention_without_its_keys_is_refused(tmp_path: Path) -> None:
    state = {name: value.contiguous() for name, value in _clip("gelu").state_dict().items() if ".1.self_attn.k_proj.weight" not in name}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"resblocks\.1\.attn has weight of q_proj, v_proj alone"):
        clip_models.build(described(CLIP, str(tmp_path / "m.safetensors")), HERE.device)


def _saved(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


STATE = {name: tensor.clone() for name, tensor in build("ViT-bigG").state_dict().items()}


def _inner(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{first}.module._orig_mod.{rest}" if rest else name


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "student.module.", "clip.", "model.")
WRAPPED = {
    **{prefix: {f"{prefix}{name}": value for name, value in STATE.items()} for prefix in PREFIXES},
    "within": {_inner(name): value for name, value in STATE.items()},
    "openai": {**STATE, **{name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}},
}
NESTED = {
    "open_clip_train": {"epoch": 3, "name": "run", "state_dict": STATE, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
    "model": {"model": STATE, "step": 3},
    "module": {"module": {f"module.{name}": value for name, value in STATE.items()}, "lr": [0.1]},
    "twice": {"model": {"state_dict": STATE}, "args": None},
    "student": {"student": STATE},
    "by tower": {
        "visual": {name.removeprefix("visual."): value for name, value in STATE.items() if name.startswith("visual.")},
        **{name: value for name, value in STATE.items() if not name.startswith("visual.")},
    },
    "with average": {"state_dict": STATE, "state_dict_ema": {name: value * 0 for name, value in STATE.items()}},
    "settings beside": {"state_dict": STATE, "model": {"name": "ViT", "depth": 2}},
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", WRAPPED)
def test_what_wrappers_put_before_names_is_taken_off(name: str, suffix: str, tmp_path: Path) -> None:
    _assert_is_the_narrow_model(_saved(WRAPPED[name], tmp_path / f"m{suffix}"), quick_gelu=name == "openai")


@pytest.mark.parametrize("name", NESTED)
def test_the_model_is_found_in_what_training_programs_save(name: str, tmp_path: Path) -> None:
    _assert_is_the_narrow_model(_saved(NESTED[name], tmp_path / "epoch_3.pt"))


def test_a_file_of_two_models_is_refused_by_their_names(tmp_path: Path) -> None:
    path = _saved({"student": STATE, "teacher": {name: value + 1 for name, value in STATE.items()}}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"several models \(student, teacher\)"):
        clip_models.build(described(ARCHITECTURES["ViT-bigG"], str(path)), HERE.device)


def test_openais_own_file_is_refused_by_a_model_with_gelu(tmp_path: Path) -> None:
    path = _saved(WRAPPED["openai"], tmp_path / "m.safetensors")
    for load in _loaders(ARCHITECTURES["ViT-bigG"], path):
        with pytest.raises(ValueError, match="OpenAI's own weights, trained with QuickGELU"):
            load()


def test_several_files_with_an_index_load_by_both_ways(tmp_path: Path) -> None:
    owners = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(STATE)}
    for file in set(owners.values()):
        _saved({name: value for name, value in STATE.items() if owners[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    _assert_is_the_narrow_model(index)


WRONG: dict[str, Any] = {
    "text alone": lambda state: {name: value for name, value in state.items() if not name.startswith("visual.")},
    "missing": lambda state: {name: value for name, value in state.items() if name != "visual.proj"},
    "unknown": lambda state: {**state, "ema.decay": torch.ones(2)},
    "shape": lambda state: {**state, "visual.proj": torch.ones(48, 33)},
    "not a number": lambda state: {**state, "ln_final.bias": torch.full((48,), float("nan"))},
    "infinite": lambda state: {**state, "visual.proj": torch.full((48, 32), float("inf"))},
    "too large for float32": lambda state: {**state, "visual.proj": torch.full((48, 32), 1e300, dtype=torch.float64)},
    "flipped bit": lambda state: {**state, "visual.proj": torch.full((48, 32), 2e37)},
    "codes": lambda state: {**state, "visual.proj": torch.ones(48, 32, dtype=torch.int8)},
    "positions": lambda state: {**state, "visual.positional_embedding": torch.ones(8, 48)},
    "a wrapper's name alone": lambda state: {**state, "module": torch.ones(2)},
    "no name": lambda state: {**state, "": torch.ones(2)},
    "two of one name": lambda state: {**state, "module.visual.proj": torch.ones(48, 32)},
}


@pytest.mark.parametrize("kind", WRONG)
def test_weights_that_do_not_belong_get_the_same_message_from_every_loader(kind: str, tmp_path: Path) -> None:
    path = _saved(WRONG[kind](STATE), tmp_path / "m.safetensors")
    description = described(ARCHITECTURES["ViT-bigG"], str(path))
    messages, loaders = [], _loaders(ARCHITECTURES["ViT-bigG"], path)
    for load in (*loaders, lambda: streaming.load(description, HERE, "fp32", int8=streaming.Int8())):
        with pytest.raises(ValueError, match=r"^teacher: .*m\.safetensors: ") as raised:
            load()
        messages.append(str(raised.value))
    assert len(set(messages)) == 1
