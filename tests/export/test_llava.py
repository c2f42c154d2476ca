"""A bundle as transformers' LLaVA: the folder that is written answers as the bundle does, and what it cannot hold is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from megakd import recipe
from megakd.export import llava_folder, llava_prompts
from megakd.export.bundle import Bundle, merge
from megakd.models.clip import ClipModel
from megakd.vqa.benchmarks.base import Question
from support.decoders import CPU, LLAMA, QWEN, SMALL, make_decoder, make_towers
from support.runs import environment
from support.small_towers import small_student

LORA = recipe.Lora(rank=4, alpha=8.0, dropout=0.0)
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}
PHI = {"model_type": "phi", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
GEMMA2 = {"model_type": "gemma2", **SMALL, "head_dim": 16}
QUESTION = "what shape is blue ?"


def _stir(module: nn.Module) -> None:
    """As if it had been trained: random weights answer all alike, and adapters start at zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(3 * parameter + 0.1 * torch.randn(parameter.shape, generator=generator))


def _saved(folder: Path, towers: ClipModel | None, tokenizer: Path | None, *, stirred: bool = True, **settings: Any) -> Path:
    visual: Any = None if towers is None else towers.clip.visual
    module = make_decoder(tokenizer, visual, lora=LORA, **{"image_tokens": 0, **settings})
    if stirred:
        _stir(module)
    Bundle(module.eval(), towers, 64).save(folder, tower_inside=True)
    return folder


def _written(bundle: Path, out: Path) -> list[str]:
    out.mkdir()
    return llava_folder.write(bundle, out)


def _loaded(out: Path) -> tuple[Any, Any]:
    return transformers.LlavaForConditionalGeneration.from_pretrained(out), transformers.AutoProcessor.from_pretrained(out)


@pytest.fixture(scope="module")
def bundle(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = "USER: {question} ASSISTANT:"
    return _saved(tmp_path_factory.mktemp("run") / "bundle", make_towers(world / "tokenizer"), world / "tokenizer", template=template)


@pytest.fixture(scope="module")
def out(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is written of it."""
    folder = tmp_path_factory.mktemp("llava") / "out"
    _written(bundle, folder)
    return folder


def test_transformers_answers_from_the_folder_as_the_bundle_does(bundle: Path, out: Path) -> None:
    model, processor = _loaded(out)
    picture = Image.new("RGB", (32, 32), "red")
    inputs = processor(images=picture, text=llava_prompts.asked(processor, QUESTION), return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = Bundle.load(bundle, CPU).answer([picture], [QUESTION], 6)
    assert expected[0]
    assert processor.decode(generated, skip_special_tokens=True).strip() == expected[0]


def test_a_conversation_has_the_ids_that_were_trained(bundle: Path, out: Path) -> None:
    _, processor = _loaded(out)
    asked = ["is there a red circle ?", QUESTION]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": " yes"}]},
        {"role": "user", "content": asked[1]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = processor(images=Image.new("RGB", (32, 32)), text=text, return_tensors="pt")["input_ids"][0].tolist()
    prompts = Bundle.load(bundle, CPU).prompts
    first = prompts.training(Question(1, "x", asked[0], (" yes",), " yes", "any"), True).ids
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert ids.count(image) == 16
    trained = [*first, *prompts.prompt(asked[1], False, False).ids[len(prompts.start) :]]
    padded = [prompts.padding if token == image else token for token in ids]
    assert padded == trained
    with pytest.raises(Exception, match="knows the roles user and assistant"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}])


@pytest.mark.parametrize(
    ("language", "settings"),
    [(QWEN, {"layer": 0}), (GPT2, {"layer": -1, "adapt": "full"}), (LLAMA, {"template": "\n{question}\n"})],
    ids=["tied", "gpt2", "line breaks"],
)
def test_other_language_models_blocks_and_prompts(language: dict[str, Any], settings: dict[str, Any], world: Path, tmp_path: Path) -> None:
    made = _saved(tmp_path / "bundle", make_towers(world / "tokenizer"), world / "tokenizer", architecture=language, **settings)
    lines = _written(made, tmp_path / "out")
    assert "12 greedy answers are the bundle's" in lines[1]


def test_siglips_tower_is_siglips_vision_model(world: Path, tmp_path: Path) -> None:
    towers = small_student("siglip", world / "tokenizer")
    assert "SiglipVisionModel" in _written(_saved(tmp_path / "bundle", towers, world / "tokenizer"), tmp_path / "out")[0]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("native", {"image_tokens": 4}, r"16 patches are averaged to 4 image tokens .*train with decoder\.image_tokens = 0"),
        ("convnext", {}, "timm's ConvNeXt"),
        ("timm", {}, "timm's tower pools by avg"),
        (None, {}, "no vision tower.*--merge OUT"),
        ("native", {"architecture": PHI}, "output layer of PhiForCausalLM has a bias"),
        ("native", {"architecture": GEMMA2}, "the logits of .* differ"),
    ],
    ids=["pooled", "convnext", "timm", "blind", "phi", "soft caps"],
)
def test_what_llava_cannot_hold_is_refused_by_name(
    kind: str | None, settings: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    towers = None if kind is None else small_student(kind, world / "tokenizer")
    with pytest.raises(ValueError, match=message):
        _written(_saved(tmp_path / "bundle", towers, world / "tokenizer", **settings), tmp_path / "out")


def test_a_quantised_language_model_is_merged_first(world: Path, tmp_path: Path) -> None:
    plain = make_decoder(world / "tokenizer", None, adapt="full")
    _stir(plain)
    plain.write_language(tmp_path / "language")
    towers = make_towers(world / "tokenizer")
    made = _saved(tmp_path / "bundle", towers, None, model=str(tmp_path / "language"), quantise="nf4", stirred=False)
    with pytest.raises(ValueError, match=r"decoder\.quantise = 'nf4'.*--merge OUT.*then export OUT"):
        _written(made, tmp_path / "out")
    merge(made, tmp_path / "merged")
    assert "greedy answers are the bundle's" in _written(tmp_path / "merged", tmp_path / "again")[1]


def test_the_command_takes_a_bundle_and_prints_what_it_compared(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "megakd.cli", "export", str(bundle), "--to", "llava", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 greedy answers are the bundle's" in done.stdout
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-text-to-text" in card
    assert "LlavaForConditionalGeneration" in card


def test_a_folder_with_other_weights_is_found_out(bundle: Path, out: Path, tmp_path: Path) -> None:
    """As the export compares them, of a folder in which one layer was changed."""
    loaded = Bundle.load(bundle, CPU)
    trial = llava_prompts.trial_of(loaded)
    assert llava_folder.compare(out, loaded, trial)
    weights = load_file(out / "model.safetensors")
    name = next(key for key in weights if "linear_1.weight" in key)
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in out.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    save_file({**weights, name: weights[name] * 1.01}, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the logits of '.*' differ by"):
        llava_folder.compare(changed, loaded, trial)
