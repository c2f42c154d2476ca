"""Whether a language model can be what a decoder has to be, tried with four prompts before anything is trained.

A decoder is given embeddings, in training padded on the right and in generation on the left, and answers greedily with a cache. Some of
transformers' causal classes cannot do that: they take no embeddings, see later tokens, let padding change an answer, or lose their state
between tokens, without an error. This depends on the class's code alone, so that of a large model a small copy with random weights is
tried: fewer layers (of every kind that it has), words and experts, and narrower where its class allows it.

Legend: B prompts, L tokens of a prompt, H the model's width, W words of the vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Conv1D, GenerationConfig, PreTrainedConfig

from megakd.models.clip import parameters_in
from megakd.models.vlm import lora as adapters
from megakd.models.vlm.decoder_config import DecoderSpec, first_line, source
from megakd.recipe import Lora

_LENGTHS, _NEW = (3, 12, 5, 8), 4  # tokens of the prompts, and of each answer
_SMALL = 5_000_000  # parameters: a model up to this size is tried itself
_LARGEST_COPY = 400_000_000  # parameters: 1.6 GB
_WORDS, _EXPERTS, _CHOSEN, _INNER, _HEAD = 64, 4, 2, 64, 16
# In units of the logits' standard deviation. Two correct computations of a logit differ by less; a wrong one differs by about 1.
_TOLERANCE = 0.02
_tried: dict[tuple[str, str], str] = {}


class _Cannot(Exception):
    """What the model does not do, as a sentence."""


class _Fails(_Cannot):
    """Its code raises an error, which may come from the sizes of a small copy."""


def check(description: DecoderSpec, layers: nn.Module) -> str:
    """Returns "" for a model that can answer, and a sentence for the user where no copy of it was small enough to try.

    layers: the model on the meta device, without adapters. torch's random state is left as it was.
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
    """The first copy that runs decides. A narrow copy that fails says nothing about the architecture."""
    failure: _Fails | None = None
    for changed, narrow in _copies(config, layers):
        try:
            model = AutoModelForCausalLM.from_config(changed, dtype=torch.float32).eval().requires_grad_(False)
            _scale_weights(model)
            try_model(model, changed)
        except _Fails as error:
            failure = failure if narrow else error
            continue
        if lora is not None:
            _try_adapters(model, lora)
        return ""
    if failure is not None:
        raise failure
    return f"{type(layers).__name__}: no small copy of it could be made to try whether it can answer"


def _copies(config: PreTrainedConfig, layers: nn.Module) -> Iterator[tuple[PreTrainedConfig, bool]]:
    """The configuration itself where it is small, else smaller ones, the smallest first; each with whether it is narrow."""
    if parameters_in(layers) <= _SMALL:
        yield copy.deepcopy(config), False
        return
    for narrow, inner in ((True, True), (False, True), (False, False)):
        try:
            changed = _shrunk(config, layers, narrow=narrow, inner=inner)
            with torch.device("meta"):
                size = parameters_in(AutoModelForCausalLM.from_config(changed))
        except Exception:
            continue
        if size <= _LARGEST_COPY:
            yield changed, narrow


def _shrunk(config: PreTrainedConfig, layers: nn.Module, *, narrow: bool, inner: bool) -> PreTrainedConfig:
    """inner: narrower MLPs. narrow: narrower heads and a narrower model, which some classes do not allow."""
    changed = copy.deepcopy(config)
    text: Any = changed.get_text_config()
    layer_count, kept = int(text.num_hidden_layers), _layers_with_every_kind(text, layers)
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == layer_count:
            setattr(text, name, type(value)(value[:kept]))
        elif isinstance(value, list) and "layer" in name and all(isinstance(index, int) for index in value):
            setattr(text, name, [index for index in value if index < kept])
    limits = {"num_hidden_layers": kept, "vocab_size": _WORDS}
    limits |= dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS)
    limits |= dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k", "top_k_experts"), _CHOSEN)
    limits |= dict.fromkeys(("n_group", "topk_group", "num_expert_groups"), 1)
    if inner:
        sizes = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
        limits |= dict.fromkeys(sizes, _INNER)
    if narrow:
        limits |= _narrow(text)
    for name, limit in limits.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and value > limit:
            with contextlib.suppress(AttributeError):  # some derive it from others
                setattr(text, name, limit)
    for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        setattr(text, name, number)  # within the copy's vocabulary
    return changed


def _narrow(text: Any) -> dict[str, int]:
    """Limits that keep the number of heads and make each narrow; for a model without attention, as Mamba and RWKV, of the width."""
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads > 0:
        return {"head_dim": _HEAD, "rotary_dim": _HEAD, "hidden_size": _HEAD * heads}
    inner = int(getattr(text, "expand", 1)) * _INNER
    state = {"num_heads": inner // _HEAD, "head_dim": _HEAD, "n_groups": 1, "time_step_rank": 4}
    return {"hidden_size": _INNER, "attention_hidden_size": _INNER, "intermediate_size": inner, **state}


def _layers_with_every_kind(text: Any, layers: nn.Module) -> int:
    """How many of the first layers hold every kind that there is: Jamba's fifth is its first with attention."""
    count = int(text.num_hidden_layers)
    if not count:
        return 0
    types = getattr(text, "layer_types", None)
    types = types if isinstance(types, list) and len(types) == count else [""] * count
    blocks = next(
        (module for module in layers.modules() if isinstance(module, nn.ModuleList) and len(module) == count), [nn.Module()] * count
    )
    kinds = [
        (kind, tuple((name, type(part).__name__) for name, part in block.named_modules()))
        for kind, block in zip(types, blocks, strict=True)
    ]
    return min(count, max(2, 1 + max(kinds.index(kind) for kind in kinds)))


def _scale_weights(model: nn.Module) -> None:
    """Draw linear layers as strong as trained ones: with their usual initialisation the embeddings dominate a small model's logits."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                inputs = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
                module.weight.normal_(0.0, inputs**-0.5)


def try_model(model: Any, config: PreTrainedConfig) -> None:
    """Raises `_Cannot` for a model, in float32 and in evaluation mode, that does not do what a decoder has to."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or 10**6
    lengths = _LENGTHS if positions >= max(_LENGTHS) + _NEW else tuple(range(1, 1 + min(4, max(1, positions - _NEW))))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, int(text.vocab_size), (1, length), generator=generator) for length in lengths]
    token_embeddings = model.get_input_embeddings()
    embedded = [token_embeddings(prompt).detach() for prompt in prompts]
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


@contextlib.contextmanager
def _refused(doing: str) -> Iterator[None]:
    """Turns whatever a model's code raises into `_Fails`, with what it was doing."""
    try:
        yield
    except Exception as error:
        raise _Fails(f"it fails when it {doing} ({first_line(error)[:230]})") from error


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
    """Training predicts later tokens: a model that sees them has nothing to learn."""
    changed = embedded[-1].clone()
    changed[:, -1] = embedded[0][:, 0]
    later = _logits(model, changed, "is given embeddings")
    if not _same(later[:, :-1], alone[-1][:, :-1], alone[-1].std()):
        raise _Cannot("it sees later tokens, the answer among them (a decoder's configuration may have to say is_decoder)")


def _check_right_padding(model: Any, embedded: list[Tensor], alone: list[Tensor]) -> None:
    batch, attend = _padded(embedded, left=False)
    together = _logits(model, batch, "is given a batch that is padded on the right", attend)
    for row, logits in enumerate(alone):
        if not _same(together[row, : logits.shape[1]], logits[0], logits.std()):
            raise _Cannot("in a batch that is padded on the right it computes something else than for a question alone")


def _check_answers(model: Any, embedded: list[Tensor]) -> None:
    """Answers of a batch that is padded on the left, with the cache, against one forward of each prompt with its answer."""
    batch, attend = _padded(embedded, left=True)
    token_embeddings = model.get_input_embeddings()
    settings = GenerationConfig(
        max_new_tokens=_NEW, do_sample=False, num_beams=1, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig(pad_token_id=0)  # without end tokens and sampling of its own
        with _refused("answers a batch that is padded on the left"):
            output = model.generate(inputs_embeds=batch, attention_mask=attend, generation_config=settings)
    finally:
        model.generation_config = own
    if tuple(output.sequences.shape) != (len(embedded), _NEW):
        raise _Cannot(f"asked for {_NEW} tokens of {len(embedded)} answers it gives {tuple(output.sequences.shape)}")
    for row, prompt in enumerate(embedded):
        conversation = torch.cat([prompt, token_embeddings(output.sequences[row : row + 1, :-1])], dim=1)
        expected = _logits(model, conversation, "is given embeddings")[0, -_NEW:]
        generated = torch.stack([step[row] for step in output.logits])
        if not _same(generated[:1], expected[:1], expected.std()):
            raise _Cannot("in a batch that is padded on the left it begins other answers than to a question alone")
        if not _same(generated, expected, expected.std()):
            raise _Cannot("with its cache of earlier tokens it goes on with other answers than without")


def _padded(embedded: list[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """((B, L, H), (B, L) of 0 where it is padding). The padding is other prompts' embeddings, which must not change anything."""
    length = max(prompt.shape[1] for prompt in embedded)
    batch, attend = [], []
    for row, prompt in enumerate(embedded):
        padding = embedded[row - 1][:, :1].expand(1, length - prompt.shape[1], -1)
        parts = [padding, prompt] if left else [prompt, padding]
        batch.append(torch.cat(parts, dim=1))
        attend.append(torch.cat([torch.full((part.shape[1],), int(part is prompt)) for part in parts]))
    return torch.cat(batch), torch.stack(attend)


def _check_gradient(model: Any, embedded: Tensor) -> None:
    """The projector learns from the gradient of the embeddings."""
    leaf = embedded.clone().requires_grad_()
    with torch.enable_grad(), _refused("learns from embeddings"):
        attend = torch.ones(leaf.shape[:2], dtype=torch.long)
        model(inputs_embeds=leaf, attention_mask=attend, use_cache=False).logits.square().sum().backward()
    if leaf.grad is None or not bool(leaf.grad.isfinite().all()) or not bool(leaf.grad.any()):
        raise _Cannot("no gradient reaches the embeddings that it is given")


def _try_adapters(model: Any, lora: Lora) -> None:
    """Raises ValueError where the model's code does not use an adapter."""
    linear = adapters.leaf_names(adapters.linear_layers(model))
    adapted = adapters.with_lora(model, lora)
    token_embeddings = model.get_input_embeddings()
    ids = torch.randint(3, token_embeddings.weight.shape[0], (8, 12), generator=torch.Generator().manual_seed(2))
    watch = adapters.Watch(adapted)
    try:
        adapted(inputs_embeds=token_embeddings(ids), attention_mask=torch.ones_like(ids), use_cache=False).logits.square().sum().backward()
    except Exception as error:  # code that does something else with a layer than call it
        raise ValueError(
            f"decoder.lora: {type(model).__name__} fails with adapters in its layers ({type(error).__name__}: {str(error)[:200]}): name "
            f"others in decoder.lora.targets, of {linear}"
        ) from error
    adapters.refuse_unreached(watch.close(), adapted)
