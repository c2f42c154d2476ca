"""A causal language model that reads image tokens and answers: any `AutoModelForCausalLM` of transformers, fed with embeddings.

    pixels -> tower's patches -> projector -> image tokens  \
                                                             inputs_embeds -> language model -> answer
    ids    -> the language model's own token embeddings     /

Not transformers' LLaVA classes: they own their vision tower, and here it is the student's, whose KD losses run through the same module
in the same step. `generate` with its cache of keys and values is the library's all the same, as it takes embeddings.

`resolve` needs no weights and finds the mistakes of the settings; `build` makes the model, before an engine partitions it. Parameters
are touched in forwards of modules alone, so that ZeRO-3 gathers them. `generate` is for a plain model: ranks that answer different
numbers of tokens would wait for each other in a partitioned one.

Legend: B questions of a local batch, L tokens of a conversation, P image tokens of one image, V patches of the tower, C its width,
H the decoder's width, N learned tokens of the batch, W words of the vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from megakd import recipe
from megakd.models.patches import measure
from megakd.models.vlm import IGNORED, decoder_tokenizer, lora
from megakd.models.vlm.decoder_config import DecoderSpec, resolve
from megakd.models.vlm.projector import Projector

__all__ = ["Decoder", "DecoderSpec", "build", "resolve"]

_BLOCK = 64  # weights that share a scale in bitsandbytes' nf4


class Decoder(nn.Module):
    """Projector and language model. Trained parameters are named `projector.*` and `language.*`.

    projector: None for a decoder without eyes. language: transformers' model, or peft's around it.
    """

    def __init__(self, description: DecoderSpec, projector: Projector | None, language: Any) -> None:
        super().__init__()
        self.description = description
        self.projector, self.language = projector, language
        # A model from the hub may come with sampling, penalties and lengths of its own, which `generate` would mix with what it is given.
        # Its end tokens stay: a chat model ends its turns by one that its tokenizer does not call the end.
        words, ends = description.tokenizer, description.ends
        self.plain.generation_config = GenerationConfig(
            bos_token_id=words.bos_token_id, eos_token_id=ends[0] if len(ends) == 1 else list(ends), pad_token_id=words.pad_token_id
        )

    def train(self, mode: bool = True) -> Decoder:
        """A language model that is frozen as a whole has no dropout in training either; transformers hands out some in one mode, some in
        the other."""
        super().train(mode)
        if self.settings.adapt == "none":
            self.language.eval()
        return self

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.description.tokenizer

    @property
    def settings(self) -> recipe.Decoder:
        return self.description.settings

    @property
    def image_tokens(self) -> int:
        """P, the places of one image in a conversation; 0 for a decoder without eyes."""
        return 0 if self.projector is None else self.projector.image_tokens

    @property
    def plain(self) -> Any:
        """transformers' own model."""
        return self.language.get_base_model() if self.adapted else self.language

    @property
    def adapted(self) -> bool:
        return hasattr(self.language, "peft_config")

    def forward(
        self, visual_tokens_BVC: Tensor | None, ids_BL: Tensor, attend_BL: Tensor, image_mask_BL: Tensor, labels_BL: Tensor
    ) -> dict[str, Tensor]:
        """`answer_nll` (B,), float32: -log p summed over the learned tokens of each question; `answer_tokens` (B,): how many there are.

        labels_BL: the ids where they are learned, -100 elsewhere; position t is predicted from those before it. attend_BL: False is
        padding. visual_tokens_BVC: of every row; where a row's mask has no place for it, it is computed and has a zero gradient, so
        that all ranks run the same modules whichever of them has images. None without eyes.
        Differentiated: the visual tokens, the projector, and of the language model what is trained.
        """
        embeddings_BLH = self.embed(visual_tokens_BVC, ids_BL, image_mask_BL)
        output = self.language(inputs_embeds=embeddings_BLH, attention_mask=attend_BL.long(), use_cache=False)
        learned_BL, next_BL = labels_BL[:, 1:] != IGNORED, labels_BL[:, 1:]
        # float32 for these rows alone: of all B * L, with a vocabulary of 152,000, it is what fills the memory.
        nll_N = F.cross_entropy(output.logits[:, :-1][learned_BL].float(), next_BL[learned_BL], reduction="none")
        row_N = learned_BL.nonzero()[:, 0]
        nll_B = nll_N.new_zeros(len(ids_BL)).index_add(0, row_N, nll_N)
        return {"answer_nll": nll_B, "answer_tokens": learned_BL.sum(dim=1).float()}

    @torch.no_grad()
    def generate(
        self, visual_tokens_BVC: Tensor | None, ids_BL: Tensor, attend_BL: Tensor, image_mask_BL: Tensor, max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy answers to prompts that are padded on the left: token ids up to the first end token, which is not among them.

        Raises ValueError where a logit is NaN: the greatest of such ones is a token like any other, and its answer a guess.
        """
        ends = self.description.ends
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=list(ends), pad_token_id=ends[0]
        )
        training, watched = self.training, _NotANumber()
        self.eval()
        try:
            generated = self.language.generate(
                inputs_embeds=self.embed(visual_tokens_BVC, ids_BL, image_mask_BL),
                attention_mask=attend_BL.long(),
                generation_config=settings,
                logits_processor=LogitsProcessorList([watched]),
            )
        finally:
            self.train(training)
        if bool(watched.seen):
            raise ValueError(
                "the decoder's logits are NaN: its weights, the tower's or the projector's are damaged, or the training has diverged; "
                "take an earlier checkpoint, or lower optim.lr"
            )
        return [list(itertools.takewhile(lambda one: one not in ends, row)) for row in generated.tolist()]

    def embed(self, visual_BVC: Tensor | None, ids_BL: Tensor, image_mask_BL: Tensor) -> Tensor:
        """(B, L, H): token embeddings, with the image tokens of a row in its marked places, in order."""
        words_BLH: Tensor = self.plain.get_input_embeddings()(ids_BL)
        if self.projector is None:
            assert visual_BVC is None, "a decoder without eyes was given visual tokens"
            return words_BLH
        assert visual_BVC is not None, "a decoder with eyes runs its projector in every forward: give it blank images"
        image_BPH = self.projector(visual_BVC).to(words_BLH.dtype)
        places_B = image_mask_BL.sum(dim=1)
        assert bool(((places_B == 0) | (places_B == image_BPH.shape[1])).all()), (
            f"places for images: {places_B.tolist()}, each 0 or {image_BPH.shape[1]}"
        )
        nth_BL = (image_mask_BL.long().cumsum(dim=1) - 1).clamp(min=0)
        image_BLH = image_BPH.gather(1, nth_BL[..., None].expand(*nth_BL.shape, words_BLH.shape[2]))
        # not a product with the mask: a blank image may become infinite in bf16, and 0 * inf is NaN
        return torch.where(image_mask_BL[..., None], image_BLH, words_BLH)

    def write_language(self, folder: Path) -> None:
        """The language model and its tokenizer as a transformers folder, without adapters: `decoder.model = FOLDER` reads it.

        The weights must be whole: of a model that ZeRO-3 does not partition.
        """
        assert self.settings.quantise == "none", "quantised weights are known by their source, not written"
        with _no_progress_bar():
            self.plain.save_pretrained(folder, state_dict=lora.own_weights(self.plain))
        decoder_tokenizer.write(self.tokenizer, folder)


class _NotANumber(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing, and remembers whether a logit was NaN; on the device, so that no token waits for it."""

    def __init__(self) -> None:
        self.seen: Tensor | bool = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen = scores.isnan().any() | self.seen
        return scores


def build(description: DecoderSpec, tower: nn.Module | None, device: torch.device, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder with its weights on `device`, for this vision tower (open_clip's `clip.visual`) or, with None, without eyes.

    On the meta device it has its shapes alone: nothing is read, and every mistake is found all the same but one in the weights.
    dtype: of the language model; projector and adapters are float32 until an engine says otherwise. Random weights draw from torch's
    global generator: seed it before. What `decoder.adapt` leaves out does not require gradients.
    Raises ValueError when weights do not fit, and for a tower that the settings do not (see `patches.measure`, `Projector`).
    """
    settings = description.settings
    projector = None
    if tower is not None:
        projector = Projector(measure(tower, settings.layer), settings.image_tokens, description.width).to(device)
    with device if device.type == "meta" else contextlib.nullcontext():
        language = _language(description, device, dtype)
        language.requires_grad_(settings.adapt == "full")
        if settings.adapt == "lora":
            language = lora.with_lora(language, settings.lora)
    return Decoder(description, projector, language).train()


def _language(description: DecoderSpec, device: torch.device, dtype: torch.dtype) -> Any:
    settings = description.settings
    if settings.model is None or device.type == "meta":
        return AutoModelForCausalLM.from_config(description.config, dtype=dtype).to(device)
    try:
        with _no_progress_bar():
            language, found = AutoModelForCausalLM.from_pretrained(
                settings.model,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **_quantised(settings.quantise, device, dtype),
            )
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"decoder.model = {settings.model!r}, quantise = {settings.quantise!r}: cannot be loaded: {error}") from error
    # transformers draws what is missing at random, with a warning
    if found["missing_keys"] or found["mismatched_keys"]:
        missing = ", ".join(sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))[:3])
        raise ValueError(f"decoder.model = {settings.model!r}: its weights do not fit its config.json ({missing}, ...)")
    if settings.quantise == "nf4" and device.type == "cpu":
        _check_blocks(language)
    return language if settings.quantise != "none" else language.to(device)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Leave the console to the run."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _check_blocks(language: nn.Module) -> None:
    """bitsandbytes 0.50 repacks weights for some CPUs when it answers, and fails on rows that are no whole number of blocks."""
    for name, module in language.named_modules():
        if type(module).__name__ == "Linear4bit" and int(module.in_features) % _BLOCK:  # type: ignore[arg-type]
            raise ValueError(
                f"decoder.quantise = 'nf4': {name} has {module.in_features} inputs, and on a CPU they must be a multiple of {_BLOCK}: take "
                f"'int8' or 'none'"
            )


def _quantised(kind: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """bitsandbytes quantises while it loads, so that the device never holds the weights in full."""
    if kind == "none":
        return {}
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else nf4))  # type: ignore[arg-type]
    return {"quantization_config": config, "device_map": {"": device}}
