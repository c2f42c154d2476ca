"""What cannot be a decoder is refused by name before a run, large models by a small copy; LoRA says what it reaches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd import recipe
from megakd.models.vlm import decoder, decoder_check, lora
from support.decoders import CPU, LLAMA, QWEN, SMALL, make_decoder, settings

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2}
MOE = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
CAN: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": QWEN,
    "mixtral": {"model_type": "mixtral", **MOE},
    "gpt2": {"model_type": "gpt2", **GPT, "n_positions": 64},
    "opt": {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48},
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "gemma2": {"model_type": "gemma2", **SMALL, "head_dim": 16},
    "few positions": {"model_type": "gpt2", **GPT, "n_positions": 6},
}
CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "rwkv": ({"model_type": "rwkv", "hidden_size": 32, "num_hidden_layers": 2}, "padded on the left it begins other answers"),
    "bamba": (
        {"model_type": "bamba", **SMALL, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "attn_layer_indices": [1]},
        "fails when it answers a batch that is padded on the left",
    ),
    "bert": ({"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}, "sees later tokens"),
}


def _check(tokenizer: Path, architecture: dict[str, Any], **more: Any) -> str:
    described = decoder.resolve(settings(tokenizer, architecture=architecture, **{"adapt": "none", **more}))
    outline = decoder.build(described, None, torch.device("meta"))
    return decoder_check.check(described, outline.plain)


@pytest.mark.parametrize("kind", CAN)
def test_models_that_can_answer_pass(kind: str, tokenizer: Path) -> None:
    state = torch.get_rng_state()
    assert _check(tokenizer, CAN[kind]) == ""
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", CANNOT)
def test_models_that_cannot_are_refused_by_name_and_reason(kind: str, tokenizer: Path) -> None:
    architecture, reason = CANNOT[kind]
    with pytest.raises(ValueError, match=rf"decoder\.architecture: \w+ \({kind}\) cannot be a decoder: .*{reason}"):
        _check(tokenizer, architecture)


def test_of_a_large_model_a_small_copy_is_tried(tokenizer: Path) -> None:
    """7 billion weights would take minutes; the default sizes of these are real models'."""
    assert _check(tokenizer, {"model_type": "llama"}) == ""
    with pytest.raises(ValueError, match=r"RwkvForCausalLM \(rwkv\) cannot be a decoder"):
        _check(tokenizer, {"model_type": "rwkv"})


def test_a_small_copy_has_a_layer_of_every_kind(tokenizer: Path) -> None:
    """Of Jamba's 32 the fifth is the first with attention, and the second the first with experts."""
    described = decoder.resolve(settings(tokenizer, architecture={"model_type": "jamba"}, adapt="none"))
    outline = decoder.build(described, None, torch.device("meta"))
    (first, *_) = decoder_check._copies(described.config, outline.plain)
    assert first[0].num_hidden_layers == 5


def test_adapters_say_what_of_a_model_they_do_not_reach(tokenizer: Path) -> None:
    """Mixtral's experts are one tensor a layer and projection, which nothing adapts."""
    module = make_decoder(tokenizer, None, architecture=CAN["mixtral"], lora=recipe.Lora(rank=4))
    said = lora.coverage(module.language)
    weights = {name: value for name, value in module.plain.named_parameters() if value.ndim > 1 and "lora" not in name}
    between = {name: value.numel() for name, value in weights.items() if "embed_tokens" not in name and "lm_head" not in name}
    covered = sum(count for name, count in between.items() if "base_layer" in name)
    assert said.startswith(f"LoRA on 8 of {8 + 2 * (2 * 4 + 1)} matrices, {100 * covered / sum(between.values()):.3g} % of their weights; ")
    assert "not covered: model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj" in said
    whole = lora.coverage(make_decoder(tokenizer, None, lora=recipe.Lora(rank=4)).language)
    assert whole == "LoRA on 14 of 14 matrices, 100 % of their weights"
    some = lora.coverage(make_decoder(tokenizer, None, lora=recipe.Lora(rank=4, targets=["q_proj"])).language)
    assert re.match(r"LoRA on 2 of 14 matrices, .*; not covered: model\.layers\.\*\.mlp\.gate_proj\.weight", some)


def test_an_adapter_that_gets_no_gradient_is_refused_and_the_remedy_works(tokenizer: Path) -> None:
    """Jamba's Mamba reads its step projection's weight without calling the layer."""
    jamba = {"model_type": "jamba", **MOE, "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    said = r"decoder\.lora\.targets: no gradient .*mamba\.dt_proj .*JambaForCausalLM does not call"
    with pytest.raises(ValueError, match=said) as refused:
        _check(tokenizer, jamba, adapt="lora")
    targets = re.findall(r"'(\w+)'", str(refused.value).split("set them to")[1])
    assert "q_proj" in targets
    assert _check(tokenizer, jamba, adapt="lora", lora=recipe.Lora(targets=targets)) == ""


def test_layers_that_peft_refuses_are_named_with_those_it_takes(tokenizer: Path) -> None:
    mamba = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    said = r"decoder\.lora\.targets: peft does not take them .*out_proj.* set them to \['dt_proj', 'in_proj'"
    with pytest.raises(ValueError, match=said):
        decoder.build(decoder.resolve(settings(tokenizer, architecture=mamba, adapt="lora")), None, CPU)


def test_a_backward_that_passes_a_layer_by_is_noticed(tokenizer: Path) -> None:
    module = make_decoder(tokenizer, None, lora=recipe.Lora(rank=4))
    watch = lora.Watch(module)
    ids = torch.randint(5, 60, (2, 7))
    layers = module.plain.model.layers
    module.plain.model.layers = layers[:1]
    module.language(input_ids=ids).logits.sum().backward()
    with pytest.raises(ValueError, match=r"no gradient reaches the adapters of model\.layers\.1\.self_attn\.q_proj, .*\(7 layers\)"):
        lora.refuse_unreached(watch.close(), module.language)
