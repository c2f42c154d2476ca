"""Mistakes in `[decoder]` are found without weights, and named with their key and remedy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megakd import recipe
from megakd.models.vlm import decoder
from support import edit_json
from support.decoders import CPU, LLAMA, make_decoder, settings


@pytest.fixture(scope="module")
def language(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language") / "language"
    make_decoder(tokenizer, None, adapt="none").write_language(folder)
    return folder


def test_an_architectures_vocabulary_and_special_words_are_the_tokenizers(tokenizer: Path) -> None:
    described = decoder.resolve(settings(tokenizer))
    words = described.tokenizer
    assert described.config.vocab_size == len(words)
    assert (described.config.eos_token_id, described.config.bos_token_id) == (words.eos_token_id, words.bos_token_id)
    assert described.width == 64


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({**LLAMA, "model_type": "lama"}, r"decoder\.architecture\.model_type = 'lama': .* nearest: .*llama"),
        ({**LLAMA, "hiden_size": 64}, r"decoder\.architecture\.hiden_size: llama has no such setting; nearest: hidden_size"),
        ({**LLAMA, "num_attention_heads": 5}, r"decoder\.architecture"),
        ({**LLAMA, "hidden_act": "shout"}, r"decoder\.architecture"),
        ({**LLAMA, "vocab_size": 10}, r"decoder\.tokenizer has \d+ words, but the language model's vocab_size is 10"),
        ({"model_type": "clip"}, r"model_type 'clip' is no causal language model"),
        ({"model_type": "gemma3"}, r"Gemma3ForConditionalGeneration is more than a language model; .* \(model_type 'gemma3_text'\)"),
        ({"model_type": "musicgen"}, r"decoder\.architecture"),
    ],
    ids=["kind", "key", "sizes", "activation", "vocabulary", "not causal", "several parts", "several parts, none of them causal"],
)
def test_an_architecture_that_is_no_language_model_is_refused(architecture: dict[str, Any], message: str, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.resolve(settings(tokenizer, architecture=architecture))


def test_of_a_model_whose_text_part_transformers_takes_only_that_is_built(tokenizer: Path) -> None:
    described = decoder.resolve(settings(tokenizer, architecture={"model_type": "mllama"}))
    assert (described.width, described.positions) == (4096, 131072)


def test_the_width_is_the_embeddings_and_the_positions_are_the_configurations(tokenizer: Path) -> None:
    """OPT-350m embeds more narrowly than it computes; GPT-2 has another name for its positions, Bloom has none."""
    opt = {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    described = decoder.resolve(settings(tokenizer, architecture={**opt, "ffn_dim": 48, "max_position_embeddings": 40}))
    assert (described.width, described.positions) == (16, 40)
    gpt = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 12}
    assert decoder.resolve(settings(tokenizer, architecture=gpt)).positions == 12
    bloom = {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2}
    assert decoder.resolve(settings(tokenizer, architecture=bloom)).positions is None


def test_end_tokens_of_the_generation_config_end_answers_and_are_written(language: Path, tmp_path: Path) -> None:
    """Llama 3's chat models end a turn by <|eot_id|>, of which only generation_config.json tells; a word that config.json names is none."""
    folder = Path(shutil.copytree(language, tmp_path / "chat"))
    ids = torch.tensor([[2, 20, 21]])
    prompt = (None, ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool), 5)
    plain = make_decoder(None, None, model=str(folder), adapt="none")
    (said,) = plain.generate(*prompt)
    assert len(said) == 5
    end, last = plain.tokenizer.eos_token_id, said[2]
    edit_json(folder / "generation_config.json", eos_token_id=[end, last])
    edit_json(folder / "config.json", eos_token_id=said[0])
    module = make_decoder(None, None, model=str(folder), adapt="none")
    assert module.description.ends == (end, last)
    assert module.generate(*prompt) == [said[: said.index(last)]]
    module.write_language(tmp_path / "again")
    assert decoder.resolve(settings(None, model=str(tmp_path / "again"))).ends == (end, last)


@pytest.mark.parametrize("kind", ["qwen2", "phi3", "llama"])
def test_a_tokenizer_of_ones_own_is_read_back_from_the_language_models_folder(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    """transformers' AutoTokenizer takes Qwen2's class for qwen2 whatever the folder says, which made another tokenizer of it."""
    module = make_decoder(tokenizer, None, architecture={**LLAMA, "model_type": kind, "pad_token_id": 0}, adapt="none")
    module.write_language(tmp_path)
    text = "what colour is the star? blue, 2 of them"
    ids = module.tokenizer(text).input_ids
    assert len(set(ids)) > 8
    for read in (decoder.resolve(settings(None, model=str(tmp_path))).tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert read(text).input_ids == ids
        assert (read.eos_token_id, read.bos_token_id) == (module.tokenizer.eos_token_id, module.tokenizer.bos_token_id)


def test_a_class_that_disagrees_with_tokenizer_json_is_not_used(language: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As transformers 5 read OLMo 2 and Granite: the class that a folder names builds normaliser and pre-tokeniser anew."""
    folder = Path(shutil.copytree(language, tmp_path / "named"))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    right, text = decoder.resolve(settings(None, model=str(language))).tokenizer, "what colour is the star? blue"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids != right(text).input_ids
    found = decoder.resolve(settings(None, model=str(folder))).tokenizer
    assert found(text).input_ids == right(text).input_ids
    assert "makes other ids of texts than its tokenizer.json, which is taken" in caplog.text


def test_an_architecture_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"decoder\.tokenizer: missing"):
        decoder.resolve(settings(None))
    with pytest.raises(ValueError, match=r"decoder\.tokenizer = .* no such folder"):
        decoder.resolve(settings(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"decoder\.tokenizer = .* no tokenizer of transformers"):
        decoder.resolve(settings(tmp_path))


def test_a_model_that_is_no_folder_of_transformers_is_refused(language: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder; train that model first"):
        decoder.resolve(settings(None, model=str(tmp_path / "run" / "language")))
    with pytest.raises(ValueError, match=r"no config\.json in that folder"):
        decoder.resolve(settings(None, model=str(tmp_path)))
    pickled = Path(shutil.copytree(language, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \.safetensors in that folder"):
        decoder.resolve(settings(None, model=str(pickled)))


def test_a_model_that_brings_code_of_its_own_is_refused_and_the_code_is_not_run(language: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(language, tmp_path / "custom"))
    auto_map = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    edit_json(folder / "config.json", model_type="custom", auto_map=auto_map)
    (folder / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    with pytest.raises(ValueError, match=r"decoder\.model = "):
        decoder.resolve(settings(None, model=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_weights_that_lack_a_layer_are_refused(language: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(language, tmp_path / "torn"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    described = decoder.resolve(settings(None, model=str(folder)))
    with pytest.raises(ValueError, match=r"do not fit its config\.json \(model\.layers\.1\.mlp\.up_proj\.weight"):
        decoder.build(described, None, CPU)


def test_an_unknown_layer_to_adapt_is_refused_with_those_there_are(tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"decoder\.lora\.targets: 'query' is no linear layer .* q_proj, up_proj, v_proj"):
        decoder.resolve(settings(tokenizer, lora=recipe.Lora(targets=["q_proj", "query"])))


def test_random_weights_are_not_quantised(tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"decoder\.quantise = 'nf4'"):
        decoder.resolve(settings(tokenizer, quantise="nf4"))


def test_layers_that_nf4_cannot_hold_on_a_cpu_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    odd = make_decoder(tokenizer, None, architecture={**LLAMA, "intermediate_size": 96}, adapt="none")
    odd.write_language(tmp_path)
    with pytest.raises(ValueError, match=r"decoder\.quantise = 'nf4': .*down_proj has 96 inputs"):
        make_decoder(None, None, model=str(tmp_path), quantise="nf4")


def test_describing_draws_no_random_numbers_and_building_draws_the_same(tokenizer: Path) -> None:
    described, state = decoder.resolve(settings(tokenizer)), torch.get_rng_state()
    decoder.resolve(settings(tokenizer))
    assert torch.equal(torch.get_rng_state(), state)
    built = []
    for _ in range(2):
        torch.manual_seed(7)
        built.append(decoder.build(described, None, CPU).state_dict())
    assert all(torch.equal(value, built[1][name]) for name, value in built[0].items())
