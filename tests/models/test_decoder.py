"""The decoder against hand computations: what it reads, what it is scored on, what of it is trained, and what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megakd import recipe
from megakd.models.patches import patch_tokens
from megakd.models.vlm import decoder
from support.decoders import LLAMA, QWEN, make_decoder, make_towers, questions

LORA = recipe.Lora(rank=4, alpha=8.0, dropout=0.0)


@pytest.fixture(scope="module")
def tower(tokenizer: Path) -> nn.Module:
    return make_towers(tokenizer).clip.visual  # type: ignore[return-value]


def _visual(tower: nn.Module, images: int) -> Tensor:
    return patch_tokens(tower, torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(4)), -2)


def _trained(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def _wake(module: decoder.DecoderModel) -> None:
    """Give the adapters' second factors, which start at zero, something to say."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("architecture", [LLAMA, QWEN], ids=["llama", "qwen2, tied"])
def test_the_answers_likelihood_is_the_one_computed_by_hand(architecture: dict[str, Any], tokenizer: Path, tower: nn.Module) -> None:
    """Row by row, without padding, embeddings put together by hand; right padding and a text-only row change nothing."""
    module = make_decoder(tokenizer, tower, architecture=architecture, adapt="none")
    batch, visual = questions([9, 5, 12], [True, False, True], 4), _visual(tower, 3)
    found = module(visual, *batch)
    assert module.projector is not None
    image_BPH = module.projector(visual)
    for row in range(3):
        own = batch.attend_BL[row]
        ids, labels, places = batch.ids_BL[row][own], batch.labels_BL[row][own], batch.image_mask_BL[row][own]
        words = module.language.get_input_embeddings()(ids)
        parts = [image_BPH[row], words[4:]] if places.any() else [words]
        logits = module.language(inputs_embeds=torch.cat(parts)[None]).logits[0]
        expected = -sum(torch.log_softmax(logits[t - 1], -1)[labels[t]] for t in range(len(ids)) if labels[t] != -100)
        torch.testing.assert_close(found["answer_nll"][row], expected, rtol=1e-5, atol=1e-5)
    assert found["answer_tokens"].tolist() == [3.0, 3.0, 3.0]


def test_what_is_not_learned_has_no_gradient_and_no_count(tokenizer: Path, tower: nn.Module) -> None:
    module = make_decoder(tokenizer, tower, adapt="none")
    batch, visual = questions([6, 6], [True, True], 4), _visual(tower, 2)
    batch.labels_BL[1] = -100
    found = module(visual, *batch)
    assert (found["answer_nll"][1].item(), found["answer_tokens"].tolist()) == (0.0, [3.0, 0.0])
    batch.labels_BL[:] = -100
    module(visual, *batch)["answer_nll"].sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.projector.parameters())


def test_image_tokens_are_averages_over_the_cells_of_a_grid(tokenizer: Path, tower: nn.Module) -> None:
    module, visual = make_decoder(tokenizer, tower, image_tokens=4), _visual(tower, 1)
    assert module.projector is not None
    cells = visual.view(1, 2, 2, 2, 2, 32).mean(dim=(2, 4)).view(1, 4, 32)  # 4 x 4 patches in 2 x 2 cells
    expected = module.projector.last(nn.functional.gelu(module.projector.first(cells)))
    torch.testing.assert_close(module.projector(visual), expected)


@pytest.mark.parametrize(("image_tokens", "places"), [(0, 16), (1, 1), (16, 16)])
def test_the_count_of_image_tokens_is_the_recipes_or_all_patches(image_tokens: int, places: int, tokenizer: Path, tower: nn.Module) -> None:
    module = make_decoder(tokenizer, tower, image_tokens=image_tokens)
    assert module.image_tokens == places
    assert module(_visual(tower, 1), *questions([5], [True], places))["answer_nll"].isfinite().all()


def test_more_image_tokens_than_patches_are_an_error_of_the_key(tokenizer: Path, tower: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"decoder\.image_tokens = 25: the vision tower has 4 x 4 patches .* 16 at most"):
        make_decoder(tokenizer, tower, image_tokens=25)


def test_a_batch_without_an_image_runs_the_tower_and_the_projector_with_a_zero_gradient(tokenizer: Path) -> None:
    tower: nn.Module = make_towers(tokenizer).clip.visual  # type: ignore[assignment]
    module = make_decoder(tokenizer, tower, adapt="none")
    visual = patch_tokens(tower, torch.zeros(2, 3, 32, 32), -2)
    module(visual, *questions([6, 8], [False, False], 4))["answer_nll"].sum().backward()
    read = [*module.projector.parameters(), tower.conv1.weight]  # type: ignore[union-attr]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in read)


def test_the_answers_reach_the_tower_and_the_projector(tokenizer: Path) -> None:
    tower: nn.Module = make_towers(tokenizer).clip.visual  # type: ignore[assignment]
    module = make_decoder(tokenizer, tower)
    module(patch_tokens(tower, torch.randn(1, 3, 32, 32), -2), *questions([6], [True], 4))["answer_nll"].sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in (tower.conv1.weight, *module.projector.parameters()))  # type: ignore[union-attr]


def test_adapters_are_in_every_linear_layer_of_the_language_model_and_nowhere_else(tokenizer: Path, tower: nn.Module) -> None:
    module = make_decoder(tokenizer, tower, adapt="lora", lora=LORA)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
    adapters = {
        f"language.base_model.model.model.layers.{n}.{part}.{layer}.lora_{side}.default.weight"
        for n in range(2)
        for part, names in zip(("self_attn", "mlp"), layers, strict=True)
        for layer in names
        for side in "AB"
    }
    projector = {f"projector.{layer}.{part}" for layer in ("first", "last") for part in ("weight", "bias")}
    assert set(_trained(module)) == adapters | projector
    assert not any("lora" in name for name, _ in tower.named_parameters())


def test_adapters_can_be_put_into_named_layers_alone(tokenizer: Path) -> None:
    module = make_decoder(tokenizer, None, adapt="lora", lora=LORA.model_copy(update={"targets": ["q_proj", "v_proj"]}))
    assert {name.split(".")[-4] for name in _trained(module)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(("adapt", "prefixes"), [("none", {"projector"}), ("full", {"projector", "language"})])
def test_the_language_model_is_frozen_or_trained_as_a_whole(adapt: str, prefixes: set[str], tokenizer: Path, tower: nn.Module) -> None:
    module = make_decoder(tokenizer, tower, adapt=adapt)
    assert {name.split(".")[0] for name in _trained(module)} == prefixes
    assert (len(_trained(module)) == len(list(module.parameters()))) == (adapt == "full")


def test_a_new_adapter_changes_nothing_and_a_trained_one_does(tokenizer: Path, tower: nn.Module) -> None:
    plain, adapted = make_decoder(tokenizer, tower, adapt="none"), make_decoder(tokenizer, tower, adapt="lora", lora=LORA)
    batch, visual = questions([7, 9], [True, True], 4), _visual(tower, 2)
    before = plain(visual, *batch)["answer_nll"]
    assert torch.equal(adapted(visual, *batch)["answer_nll"], before)
    _wake(adapted)
    assert not torch.allclose(adapted(visual, *batch)["answer_nll"], before)


LENGTHS, IMAGES = [3, 9, 5, 12, 4, 7, 10, 6], [True, True, False, True, True, False, True, True]


def _answers(module: decoder.DecoderModel, visual: Tensor | None, batch: int) -> Iterator[list[int]]:
    places = module.image_tokens
    rows = [
        questions([length], [image and places > 0], places, left=True, seed=n)
        for n, (length, image) in enumerate(zip(LENGTHS, IMAGES, strict=True))
    ]
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        longest = max(row.ids_BL.shape[1] for row in part)
        padded = [torch.cat([nn.functional.pad(row[n], (longest - row[n].shape[1], 0)) for row in part]) for n in range(3)]
        yield from module.generate(None if visual is None else visual[start : start + batch], *padded, 12)


@pytest.mark.parametrize("sees", [True, False], ids=["seeing", "blind"])
@pytest.mark.parametrize("architecture", [LLAMA, QWEN], ids=["llama", "qwen2, tied"])
def test_answers_are_equal_in_batches_of_one_and_eight(architecture: dict[str, Any], sees: bool, tokenizer: Path, tower: nn.Module) -> None:
    module = make_decoder(tokenizer, tower if sees else None, architecture=architecture, lora=LORA)
    _wake(module)
    with torch.no_grad():
        for parameter in module.language.parameters():
            parameter.mul_(3)  # random weights answer all alike; larger ones listen to the question
    visual = _visual(tower, 8).detach() if sees else None
    alone, together = list(_answers(module, visual, 1)), list(_answers(module, visual, 8))
    assert alone == together == list(_answers(module, visual, 8))
    assert len({tuple(answer) for answer in alone}) > 3


def test_generated_answers_are_the_likeliest_next_words_of_the_whole_forward(tokenizer: Path, tower: nn.Module) -> None:
    """The cache of keys and values, and the first token's place after the image tokens, by running everything anew for each token."""
    module = make_decoder(tokenizer, tower, lora=LORA)
    _wake(module)
    visual, batch = _visual(tower, 1), questions([6], [True], 4, left=True)
    answer = module.generate(visual, *batch[:3], 5)[0]
    assert module.projector is not None
    end, said, words = module.tokenizer.eos_token_id, [], module.language.get_input_embeddings()
    image = module.projector(visual)
    while len(said) < 5:
        ids = torch.cat([batch.ids_BL[0, 4:], torch.tensor(said, dtype=torch.long)])
        likeliest = int(module.language(inputs_embeds=torch.cat([image[0], words(ids)])[None]).logits[0, -1].argmax())
        if likeliest == end:
            break
        said.append(likeliest)
    assert answer == said


def test_an_answer_ends_before_the_end_token(tokenizer: Path) -> None:
    module = make_decoder(tokenizer, None, adapt="full")
    with torch.no_grad():
        module.language.lm_head.weight.zero_()
        module.language.lm_head.weight[module.tokenizer.eos_token_id] = 1.0
        module.language.model.norm.weight.fill_(1.0)
    batch = questions([6, 4], [False, False], 0, left=True)
    hidden = module.language(inputs_embeds=module.language.get_input_embeddings()(batch.ids_BL), output_hidden_states=True)
    ends = (hidden.logits[:, -1].argmax(-1) == module.tokenizer.eos_token_id).tolist()
    answers = module.generate(None, *batch[:3], 3)
    assert all((answer == []) == end for answer, end in zip(answers, ends, strict=True))
    assert all(module.tokenizer.eos_token_id not in answer for answer in answers)


@pytest.mark.parametrize("architecture", [LLAMA, QWEN], ids=["llama", "qwen2, tied"])
def test_a_written_language_model_is_a_decoders_model_again(architecture: dict[str, Any], tokenizer: Path, tmp_path: Path) -> None:
    """With adapters in it: what is written are its own weights alone."""
    module = make_decoder(tokenizer, None, architecture=architecture, lora=LORA)
    module.write_language(tmp_path / "language")
    end = json.loads((tmp_path / "language" / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert end == module.tokenizer.eos_token_id, "`generate` by others would not stop"
    batch = questions([7, 9], [False, False], 0)
    again = make_decoder(None, None, model=str(tmp_path / "language"), adapt="none")
    assert torch.equal(again(None, *batch)["answer_nll"], module(None, *batch)["answer_nll"])


@pytest.mark.parametrize("quantise", ["int8", "nf4"])
def test_a_quantised_base_is_near_the_full_one_and_adapters_learn(quantise: str, tokenizer: Path, tower: nn.Module, tmp_path: Path) -> None:
    make_decoder(tokenizer, None, adapt="none").write_language(tmp_path / "language")
    model = str(tmp_path / "language")
    full, held = (make_decoder(None, tower, model=model, lora=LORA, quantise=kind) for kind in ("none", quantise))
    batch, visual = questions([7, 9], [True, True], 4), _visual(tower, 2)
    assert held.projector is not None
    assert full.projector is not None
    held.projector.load_state_dict(full.projector.state_dict())
    found = held(visual, *batch)["answer_nll"]
    torch.testing.assert_close(found, full(visual, *batch)["answer_nll"], rtol=0.02, atol=0.02)
    found.sum().backward()
    learned = [parameter.grad for name, parameter in held.named_parameters() if "lora_B" in name]
    assert learned
    assert all(grad is not None and grad.abs().sum() > 0 for grad in learned)


@pytest.mark.parametrize(("adapt", "drops"), [("none", False), ("lora", True), ("full", True)])
def test_dropout_is_on_in_training_unless_frozen(adapt: str, drops: bool, tokenizer: Path, tower: nn.Module, tmp_path: Path) -> None:
    """However it was made, and after it has answered."""
    gpt = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    made = make_decoder(tokenizer, tower, architecture=gpt, adapt=adapt, lora=LORA)
    made.write_language(tmp_path / "language")
    loaded = make_decoder(None, tower, model=str(tmp_path / "language"), adapt=adapt, lora=LORA)
    for module in (made, loaded):
        dropouts = [part for part in module.language.modules() if isinstance(part, nn.Dropout) and part.p > 0]
        assert dropouts
        assert all(part.training == drops for part in dropouts)
        module.generate(_visual(tower, 1), *questions([6], [True], 4, left=True)[:3], 2)
        assert all(part.training == drops for part in dropouts)


def test_logits_that_are_nan_are_an_error_and_no_answer(world: Path) -> None:
    decoder = make_decoder(world / "tokenizer", None)
    ids, attend = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
    nowhere = torch.zeros(1, 3, dtype=torch.bool)
    assert len(decoder.generate(None, ids, attend, nowhere, 2)) == 1
    with torch.no_grad():
        next(iter(decoder.language.parameters()))[6] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        decoder.generate(None, ids, attend, nowhere, 2)
