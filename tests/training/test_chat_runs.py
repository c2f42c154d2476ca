"""`decoder.template = "chat"` from the dry run to the bundle and transformers' LLaVA: one prompt, and answers that end with the turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from megakd.export import llava_folder, llava_prompts
from megakd.export.bundle import Bundle, resolve_bundle
from megakd.models.vlm import decoder
from megakd.recipe.resume import change
from support.chat_templates import CHATML
from support.decoders import CPU, evaluated_and_asked_again, make_decoder, make_towers, settings
from support.runs import TINY_LLAMA, answering, ran, train

TURNS = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def talking(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's tokenizer with a chat template and its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    tokenizer.add_special_tokens({"extra_special_tokens": list(TURNS)})
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("talking")
    tokenizer.save_pretrained(folder)
    return folder


def chat(world: Path, tokenizer: Path) -> tuple[str, ...]:
    own = tuple(one for one in answering(world) if not one.startswith(("decoder.template", "decoder.image_tokens")))
    return (*own, "decoder.template=chat", "decoder.image_tokens=0", f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={tokenizer}")


def test_a_run_is_trained_judged_and_asked_again_by_the_chat_template(
    recipe_file: Path, world: Path, talking: Path, tmp_path: Path
) -> None:
    sets = (*chat(world, talking), "optim.steps=2", "optim.warmup=0", "decoder.image_fit=pad")
    shown = train(recipe_file, "--dry_run", sets=sets)
    assert shown.code == 0, shown.err
    assert "prompts: the tokenizer's chat template, whose answers end with <|im_end|>: '<|im_start|>system" in shown.out
    assert "an image, padded and whole, becomes 16 tokens" in shown.out
    run = ran(recipe_file, tmp_path / "run", *sets)
    judged, again = evaluated_and_asked_again(run)
    assert judged == again
    kept = resolve_bundle(run / "bundle").decoder
    assert (kept.settings.template, kept.settings.image_fit, kept.tokenizer.chat_template) == ("chat", "pad", CHATML)
    assert change("decoder.template") == "refused"


def test_a_tokenizer_without_a_chat_template_is_one_message_of_the_dry_run(recipe_file: Path, world: Path) -> None:
    shown = train(recipe_file, "--dry_run", sets=chat(world, world / "tokenizer"))
    assert shown.code == 2
    assert 'decoder.template = "chat": the tokenizer has no chat template; name a chat model, or give words' in shown.err


def test_greedy_answers_stop_at_the_end_of_the_turn(world: Path, talking: Path) -> None:
    """A language model that says nothing but the end of turn: with a template in words it would say it again and again."""
    towers, given = make_towers(world / "tokenizer"), {}
    for template in ("chat", "{question}"):
        model = make_decoder(talking, towers.clip.visual, template=template).eval()
        bundle = Bundle(model, towers, 64)
        end = int(model.tokenizer.convert_tokens_to_ids("<|im_end|>"))  # type: ignore[arg-type]
        assert (end in model.description.ends) == (template == "chat")
        language: Any = model.language.get_base_model() if model.adapted else model.language
        hidden: list[torch.Tensor] = []
        language.lm_head.register_forward_pre_hook(lambda _, inputs, kept=hidden: kept.append(inputs[0][0, -1]))
        bundle.answer([Image.new("RGB", (32, 32))], ["what colour is it?"], 1)
        with torch.no_grad():
            language.lm_head.weight.zero_()
            language.lm_head.weight[end] = hidden[0]
        batch = bundle._batch([None], ["what colour is it?"], short=False)
        given[template] = model.generate(bundle.look([None]), *batch[:3], 4)[0]
    assert given["chat"] == []
    assert given["{question}"][:1] == [end]


def test_a_llava_folder_asks_by_the_same_template(world: Path, talking: Path, tmp_path: Path) -> None:
    towers = make_towers(world / "tokenizer")
    model = make_decoder(talking, towers.clip.visual, template="chat", image_tokens=0, image_fit="pad")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.ndim > 1:
                parameter.copy_(3 * parameter + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    Bundle(model.eval(), towers, 64).save(tmp_path / "bundle", tower_inside=True)
    (tmp_path / "out").mkdir()
    said = llava_folder.write(tmp_path / "bundle", tmp_path / "out")
    assert "greedy answers are the bundle's" in said[1]
    trial = llava_prompts.trial_of(Bundle.load(tmp_path / "bundle", CPU))
    assert all(start > 3 for start in trial.starts), "the image stands in the user's turn, behind the template's own system message"


def test_the_first_end_token_is_the_templates(talking: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talking)
    ends = decoder.resolve(settings(talking, template="chat")).ends
    assert ends[:2] == (tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id)
    assert decoder.resolve(settings(talking, template="{question}")).ends[0] == tokenizer.eos_token_id
