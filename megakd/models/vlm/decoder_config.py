"""What is known of a decoder before its weights are touched: configuration, tokenizer, and that the settings fit each other."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from megakd.models.vlm import decoder_tokenizer, lora
from megakd.models.vlm.chat_template import ChatTemplate
from megakd.recipe import Decoder
from megakd.recipe.texts import nearest
from megakd.recipe.vqa import CHAT


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder without weights."""

    settings: Decoder
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    width: int  # H, of the token embeddings; OPT-350m's blocks are wider
    positions: int | None  # the longest sequence that the language model takes; None: no limit is known
    ends: tuple[int, ...]  # tokens that end an answer: first the one that is learned, the tokenizer's or the chat template's, then the rest

    @property
    def rows(self) -> int:
        """W, of the output layer; a model may have more than its tokenizer has words."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def words(self) -> int:
        """The tokenizer's largest id and 1."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        return 1 + max(vocabulary.values())


def resolve(settings: Decoder) -> DecoderSpec:
    """Configuration and tokenizer of the recipe's `[decoder]`.

    Raises ValueError naming the key and the remedy: no such model, weights that only unpickling could read, code of its own, an
    architecture that does not parse, a tokenizer that is missing or larger than the vocabulary, adapters on layers that are not there.
    """
    tokenizer = _tokenizer(settings)
    if settings.architecture is not None:
        config = _own_architecture(settings.architecture, tokenizer)
    else:
        remedy = "no configuration that transformers reads; check the name, the network, and that it needs no code of its own"
        with _transformers_reads(f"decoder.model = {settings.model!r}: {remedy}"):
            config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{source(settings)}: model_type {config.model_type!r} is no causal language model of transformers")
    vocabulary = _text_part(config, settings).vocab_size
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"decoder.tokenizer has {len(tokenizer)} words, but the language model's vocab_size is {vocabulary}: take the tokenizer that "
            f"it was trained with"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("decoder.tokenizer has no end token, so that answers would have no end: name another")
    if settings.quantise != "none" and settings.model is None:
        raise ValueError(f"decoder.quantise = {settings.quantise!r}: random weights of an architecture are not worth it; set it to 'none'")
    if settings.quantise != "none" and importlib.util.find_spec("accelerate") is None:
        raise ValueError(f"decoder.quantise = {settings.quantise!r} needs accelerate: `pip install accelerate`; or set it to 'none'")
    outline = _outline(config, settings)
    if settings.adapt == "lora":
        lora.check(settings.lora, outline)
    positions = getattr(outline.config, "max_position_embeddings", None) or 0
    width = int(outline.get_input_embeddings().embedding_dim)
    return DecoderSpec(settings, config, tokenizer, width, positions if positions > 0 else None, _ends(settings, config, tokenizer))


def _ends(settings: Decoder, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The chat template's end token, the tokenizer's, and those of the model's generation_config.json and config.json, as Llama 3's
    <|eot_id|>.

    Where config.json names none, the configuration class has a default, which may be an ordinary word here: only special tokens count.
    """
    special = {*tokenizer.all_special_ids, *(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)}
    configured = [number for number in _ids(config.get_text_config().eos_token_id) if number in special]
    generating: list[int] = []
    if settings.model is not None:
        try:
            generating = _ids(GenerationConfig.from_pretrained(settings.model).eos_token_id)
        except OSError:  # it has no generation_config.json
            pass
        except Exception as error:
            raise ValueError(
                f"decoder.model = {settings.model!r}: its generation_config.json cannot be read: {first_line(error)}"
            ) from error
    chat = [ChatTemplate(tokenizer, "decoder.template").end] if settings.template == CHAT else []
    ends = [*chat, int(tokenizer.eos_token_id), *(number for number in generating if 0 <= number < len(tokenizer)), *configured]
    return tuple(dict.fromkeys(ends))


def _ids(value: Any) -> list[int]:
    """eos_token_id of a configuration: one, several or none."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [number for number in values if isinstance(number, int) and not isinstance(number, bool)]


def source(settings: Decoder) -> str:
    return "decoder.architecture" if settings.model is None else f"decoder.model = {settings.model!r}"


def _tokenizer(settings: Decoder) -> PreTrainedTokenizerBase:
    name = settings.tokenizer or settings.model
    if name is None:
        raise ValueError("decoder.tokenizer: missing; an architecture has none of its own: name a folder (`megakd shapes` writes one)")
    if settings.tokenizer is not None and not Path(name).is_dir():
        raise ValueError(f"decoder.tokenizer = {name!r}: no such folder; `megakd shapes` writes one beside its shards")
    if settings.tokenizer is None:
        _check_folder(name)
    key = "decoder.tokenizer" if settings.tokenizer is not None else "decoder.model"
    with _transformers_reads(f"{key} = {name!r}: no tokenizer of transformers"):
        return decoder_tokenizer.read(name)


def _check_folder(name: str) -> None:
    """Raises ValueError for a path that does not exist, which transformers would ask the hub for, and for a folder without a model."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ValueError(f"decoder.model = {name!r}: no such folder; train that model first, or give another folder")
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"decoder.model = {name!r}: no config.json in that folder: it is no model that transformers wrote")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"decoder.model = {name!r}: no .safetensors in that folder; weights in other files could run code when they are read: "
            f"convert them where you trust them"
        )


def _own_architecture(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of a recipe's table; the vocabulary is the tokenizer's where the table does not say."""
    kind = architecture.get("model_type")
    if kind not in CONFIG_MAPPING:
        near = ", ".join(nearest(kind, CONFIG_MAPPING.keys(), most=3)) or "-"
        raise ValueError(f"decoder.architecture.model_type = {kind!r}: transformers has no such model; nearest: {near}")
    defaults = _configured({"model_type": kind})
    known = {*defaults.to_dict(), *defaults.attribute_map}
    for key in architecture:
        if key not in known:  # transformers would keep it as an attribute that nothing reads
            near = ", ".join(nearest(key, known, most=3)) or "none"
            raise ValueError(f"decoder.architecture.{key}: {kind} has no such setting; nearest: {near}")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return _configured({"vocab_size": len(tokenizer), **special, **architecture})


def _configured(values: dict[str, Any]) -> PreTrainedConfig:
    with _transformers_reads("decoder.architecture"):
        config: PreTrainedConfig = AutoConfig.for_model(**values)
    return config


def _outline(config: PreTrainedConfig, settings: Decoder) -> PreTrainedModel:
    """The model on the meta device: layers without weights.

    Raises ValueError for one that is more than a language model: of some transformers takes the text part (Llama 4), of others (Gemma 3)
    it makes every part, and a vision tower would be loaded, adapted and never used.
    """
    with _transformers_reads(f"{source(settings)} does not give a model"), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    text = _text_part(model.config, settings)
    if text is not model.config:
        raise ValueError(
            f"{source(settings)}: {type(model).__name__} is more than a language model; save its text part (model_type "
            f"{text.model_type!r}) as a folder of its own, or name another"
        )
    return model


def _text_part(config: PreTrainedConfig, settings: Decoder) -> PreTrainedConfig:
    """The configuration of the language model in a model of several parts."""
    try:
        return config.get_text_config()
    except ValueError as error:
        raise ValueError(f"{source(settings)}: model_type {config.model_type!r} has several language models: name one of them") from error


@contextlib.contextmanager
def _transformers_reads(what: str) -> Iterator[None]:
    """Whatever transformers raises inside is a mistake of the setting: its classes have as many kinds of error as there are of them."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
