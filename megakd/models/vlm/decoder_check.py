"""Whether a language model can be what a decoder has to be, tried with four prompts before anything is trained.

A decoder is given embeddings, in training padded on the right and in generation on the left, and answers greedily with a cache. Not every
class that transformers calls causal can: some take no embeddings, some see later tokens, some let padding change an answer or lose their
state between tokens, without an error. What decides it is the class's code, so that a small copy of the architecture with random weights
is tried where the model is large: fewer layers (of every kind that it has), words and experts, and narrower where its class allows it.

Legend: L tokens of a prompt, H the model's width, W words of the vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Conv1D, GenerationConfig, PreTrainedConfig

from megakd.models.vlm import lora as adapters
from megakd.models.vlm.decoder_config import DecoderSpec, source
from megakd.recipe import Lora

_LENGTHS, _NEW = (3, 12, 5, 8), 4  # tokens of the prompts, and of each answer
_ENOUGH = 5_000_000  # parameters of a model that is tried as it is
_MOST = 400_000_000  # of a copy: 1.6 GB
_WORDS, _EXPERTS, _CHOSEN, _INNER, _HEAD = 64, 4, 2, 64, 16
# Two computations of one logit agree within this part of the logits' standard deviation; what is wrong differs by about the whole.
_TOLERANCE = 0.02
_tried: dict[tuple[str, str], str] = {}


class _Cannot(Exception):
    """What the model does not do, for people."""


class _Fails(_Cannot):
    """Its code raises something, of which the sizes of a small copy may be the cause."""


@dataclass(frozen=True)
class _Small:
    """A way to make an architecture small. narrow: heads and width too, which some classes do not allow."""

    narrow: bool
    inner: bool


_WAYS = (_Small(narrow=True, inner=True), _Small(narrow=False, inner=True), _Small(narrow=False, inner=False))


def check(description: DecoderSpec, layers: nn.Module) -> str:
    """ "" for a model that can answer, and a sentence for people where no copy of it was small enough to try.

    layers: the model on the meta device, without adapters. Neither torch's random numbers nor weights are touched.
    Raises ValueError that names the key, the class and what it does not do; and for an adapter that would get no gradient.
    """
    config, settings = description.config, description.settings
    lora = settings.lora if settings.adapt == "lora" else None
    key = (config.to_json_string(use_diff=False), "" if lora is None else lora.model_dump_json())
    if key not in _tried:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                _tried[key] = _try_copies(config, layers, lora)
        except _Cannot as error:
            name = type(layers).__name__
            raise ValueError(
                f"{source(settings)}: {name} ({config.model_type}) cannot be a decoder: {error}; take another language model"
            ) from error
    return _tried[key]


def _try_copies(config: PreTrainedConfig, layers: nn.Module, lora: Lora | None) -> str:
    """The first copy that runs decides; a narrow one that breaks says nothing about the architecture."""
    broken: _Fails | None = None
    for changed, narrow in _copies(config, layers):
        try:
            model = AutoModelForCausalLM.from_config(changed, dtype=torch.float32).eval().requires_grad_(False)
            _stir(model)
            try_model(model, changed)
        except _Fails as error:
            broken = broken if narrow else error
            continue
        if lora is not None:
            _try_adapters(model, lora)
        return ""
    if broken is not None:
        raise broken
    return f"{type(layers).__name__}: no small copy of it could be made to try whether it can answer"


def _copies(config: PreTrainedConfig, layers: nn.Module) -> Iterator[tuple[PreTrainedConfig, bool]]:
    """The configuration itself, where it is small, or smaller ones, as many as are worth trying; each with whether it is narrow."""
    if _size(layers) <= _ENOUGH:
        yield copy.deepcopy(config), False
        return
    for way in _WAYS:
        try:
            changed = _shrunk(config, layers, way)
            with torch.device("meta"):
                size = _size(AutoModelForCausalLM.from_config(changed))
        except Exception:
            continue
        if size <= _MOST:
            yield changed, way.narrow


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _shrunk(config: PreTrainedConfig, layers: nn.Module, way: _Small) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    text: Any = changed.get_text_config()
    before, kept = int(text.num_hidden_layers), _kinds(text, layers)
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == before:
            setattr(text, name, type(value)(value[:kept]))
        elif isinstance(value, list) and "layer" in name and all(isinstance(one, int) for one in value):
            setattr(text, name, [one for one in value if one < kept])
    limits = {"num_hidden_layers": kept, "vocab_size": _WORDS}
    limits |= dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS)
    limits |= dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k", "top_k_experts"), _CHOSEN)
    limits |= dict.fromkeys(("n_group", "topk_group", "num_expert_groups"), 1)
    if way.inner:
        inner = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
        limits |= dict.fromkeys(inner, _INNER)
    if way.narrow:
        limits |= _narrow(text)
    for name, most in limits.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and value > most:
            with contextlib.suppress(AttributeError):  # some derive it from others
                setattr(text, name, most)
    for place, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        setattr(text, name, place)  # words that the copy has
    return changed


def _narrow(text: Any) -> dict[str, int]:
    """Limits that leave as many heads as there are, each narrow; of a model without attention, as Mamba and RWKV, the width alone."""
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads > 0:
        return {"head_dim": _HEAD, "rotary_dim": _HEAD, "hidden_size": _HEAD * heads}
    inner = int(getattr(text, "expand", 1)) * _INNER
    state = {"num_heads": inner // _HEAD, "head_dim": _HEAD, "n_groups": 1, "time_step_rank": 4}
    return {"hidden_size": _INNER, "attention_hidden_size": _INNER, "intermediate_size": inner, **state}


def _kinds(text: Any, layers: nn.Module) -> int:
    """How many of the first layers hold every kind that there is: Jamba's fifth is its first with attention."""
    count = int(text.num_hidden_layers)
    lists = [module for module in layers.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    named = getattr(text, "layer_types", None)
    kinds = [
        (
            named[place] if isinstance(named, list) and len(named) == count else "",
            *(tuple((name, type(part).__name__) for name, part in one[place].named_modules()) for one in lists[:1]),
        )
        for place in range(count)
    ]
    return min(count, max(2, 1 + max(kinds.index(kind) for kind in kinds))) if kinds else count


def _stir(model: nn.Module) -> None:
    """Make linear layers as strong as trained ones: as they are drawn, the layers of a small model say little beside the embeddings."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                inputs = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
                module.weight.normal_(0.0, inputs**-0.5)


def try_model(model: Any, config: PreTrainedConfig) -> None:
    """Raises `_Cannot` for a model, in float32 and in evaluation mode, that does not do what a decoder has to."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or 10**6
    lengths = _LENGTHS if most >= max(_LENGTHS) + _NEW else tuple(range(1, 1 + min(4, max(1, most - _NEW))))
    drawn = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, int(text.vocab_size), (1, length), generator=drawn) for length in lengths]
    words = model.get_input_embeddings()
    embedded = [words(prompt).detach() for prompt in prompts]
    with torch.no_grad():
        alone = [_logits(model, one, "is given embeddings") for one in embedded]
        _check_embeddings(model, prompts, alone)
        _check_order(model, embedded, alone)
        _check_right_padding(model, embedded, alone)
        _check_answers(model, embedded)
    _check_gradient(model, embedded[-1])


def _logits(model: Any, embedded: Tensor, doing: str, attend: Tensor | None = None) -> Tensor:
    """(B, L, W), as training asks for them."""
    attend = torch.ones(embedded.shape[:2], dtype=torch.long) if attend is None else attend
    with _refused(doing):
        logits: Tensor = model(inputs_embeds=embedded, attention_mask=attend, use_cache=False).logits
    if logits.shape[:2] != embedded.shape[:2] or not bool(logits.isfinite().all()):
        raise _Cannot(f"its logits are of shape {tuple(logits.shape)} for embeddings of {tuple(embedded.shape)}, or not finite")
    return logits


class _refused:
    """Turns whatever a model's code raises into what it could not do."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, _Cannot):
            first = next(iter(str(error).strip().splitlines()), "")
            raise _Fails(f"it fails when it {self._doing} ({type(error).__name__}: {first[:200]})") from error


def _same(one: Tensor, other: Tensor, scale: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= _TOLERANCE * scale)


def _check_embeddings(model: Any, prompts: list[Tensor], alone: list[Tensor]) -> None:
    for prompt, logits in zip(prompts, alone, strict=True):
        with _refused("is given token ids"):
            by_ids = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=False).logits
        if not _same(by_ids, logits, logits.std()):
            raise _Cannot("it computes something else from the embeddings of tokens than from their ids")
    if _same(alone[0][:, -1:], alone[-1][:, -1:], 0.01 * alone[0].std()):
        raise _Cannot("the embeddings that it is given make no difference")


def _check_order(model: Any, embedded: list[Tensor], alone: list[Tensor]) -> None:
    """What comes later is what training asks for: a model that sees it has nothing to learn."""
    changed = embedded[-1].clone()
    changed[:, -1] = embedded[0][:, 0]
    later = _logits(model, changed, "is given embeddings")
    if not _same(later[:, :-1], alone[-1][:, :-1], alone[-1].std()):
        raise _Cannot("it sees later tokens, the answer among them (a decoder's configuration may have to say is_decoder)")


def _check_right_padding(model: Any, embedded: list[Tensor], alone: list[Tensor]) -> None:
    length = max(one.shape[1] for one in embedded)
    batch, attend = _padded(embedded, length, left=False)
    together = _logits(model, batch, "is given a batch that is padded on the right", attend)
    for row, logits in enumerate(alone):
        if not _same(together[row, : logits.shape[1]], logits[0], logits.std()):
            raise _Cannot("in a batch that is padded on the right it computes something else than for a question alone")


def _check_answers(model: Any, embedded: list[Tensor]) -> None:
    """Answers of a batch that is padded on the left, with the cache, against one forward of each prompt with its answer."""
    batch, attend = _padded(embedded, max(one.shape[1] for one in embedded), left=True)
    words = model.get_input_embeddings()
    settings = GenerationConfig(
        max_new_tokens=_NEW, do_sample=False, num_beams=1, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    own = model.generation_config
    try:
        # a model of a few layers may come with end tokens and sampling of its own
        model.generation_config = GenerationConfig(pad_token_id=0)
        with _refused("answers a batch that is padded on the left"):
            found = model.generate(inputs_embeds=batch, attention_mask=attend, generation_config=settings)
    finally:
        model.generation_config = own
    if tuple(found.sequences.shape) != (len(embedded), _NEW):
        raise _Cannot(f"asked for {_NEW} tokens of {len(embedded)} answers it gives {tuple(found.sequences.shape)}")
    for row, prompt in enumerate(embedded):
        whole = torch.cat([prompt, words(found.sequences[row : row + 1, :-1])], dim=1)
        expected = _logits(model, whole, "is given embeddings")[0, -_NEW:]
        given = torch.stack([step[row] for step in found.logits])
        if not _same(given[:1], expected[:1], expected.std()):
            raise _Cannot("in a batch that is padded on the left it begins other answers than to a question alone")
        if not _same(given, expected, expected.std()):
            raise _Cannot("with its cache of earlier tokens it goes on with other answers than without")


def _padded(embedded: list[Tensor], length: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """((B, L, H), (B, L) of 0 where it is padding). Padding is of other words, which nothing may look at."""
    batch, attend = [], []
    for row, one in enumerate(embedded):
        padding = embedded[row - 1][:, :1].expand(1, length - one.shape[1], -1)
        ones = torch.ones(one.shape[1], dtype=torch.long)
        parts, marks = [padding, one], [ones.new_zeros(padding.shape[1]), ones]
        batch.append(torch.cat(parts if left else parts[::-1], dim=1))
        attend.append(torch.cat(marks if left else marks[::-1]))
    return torch.cat(batch), torch.stack(attend)


def _check_gradient(model: Any, embedded: Tensor) -> None:
    """The projector learns by it."""
    leaf = embedded.clone().requires_grad_()
    with torch.enable_grad(), _refused("learns from embeddings"):
        attend = torch.ones(leaf.shape[:2], dtype=torch.long)
        model(inputs_embeds=leaf, attention_mask=attend, use_cache=False).logits.square().sum().backward()
    if leaf.grad is None or not bool(leaf.grad.isfinite().all()) or not bool(leaf.grad.any()):
        raise _Cannot("no gradient reaches the embeddings that it is given")


def _try_adapters(model: Any, lora: Lora) -> None:
    """Raises ValueError where the model's code passes an adapter by."""
    linear = {name.rpartition(".")[2] for name in adapters.linear_layers(model)}
    adapted = adapters.with_lora(model, lora)
    words = model.get_input_embeddings()
    ids = torch.randint(3, words.weight.shape[0], (8, 12), generator=torch.Generator().manual_seed(2))
    watch = adapters.Watch(adapted)
    try:
        adapted(inputs_embeds=words(ids), attention_mask=torch.ones_like(ids), use_cache=False).logits.square().sum().backward()
    except Exception as error:  # code that does something else with a layer than call it
        raise ValueError(
            f"decoder.lora: {type(model).__name__} fails with adapters in its layers ({type(error).__name__}: {str(error)[:200]}): name "
            f"others in decoder.lora.targets, of {sorted(linear)}"
        ) from error
    adapters.refuse_unreached(watch.close(), adapted)
