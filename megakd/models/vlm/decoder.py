"""A causal language model that reads image tokens and answers: any `AutoModelForCausalLM` of transformers, fed with embeddings.

    pixels -> tower's patches -> projector -> image tokens  \
                                                             inputs_embeds -> language model -> answer
    ids    -> the language model's own token embeddings     /

transformers' LLaVA classes own their vision tower; here it is the student's, whose KD losses run through the same module in the same
step. `generate`, with its key-value cache, is the library's.

`resolve` needs no weights and finds the mistakes of the settings; `build` makes the model, before an engine partitions it. Parameters
are used only inside the modules' forwards, so that ZeRO-3 gathers them. `generate` is for a model that is not partitioned: ranks whose
answers differ in length would wait for each other.

Legend: B questions of a local batch, L tokens of a conversation, P image tokens of one image, V patches of the tower, C its width,
H the decoder's width, N learned tokens of the batch, W rows of the output layer.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
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
from megakd.models.patches import evaluating, measure
from megakd.models.vlm import IGNORED, decoder_tokenizer, lora
from megakd.models.vlm.decoder_config import DecoderSpec, resolve
from megakd.models.vlm.projector import Projector

__all__ = ["DecoderModel", "DecoderSpec", "build", "resolve"]

# Of logits (N, W) of answer tokens, one a token: (N,), differentiable.
Divergence = Callable[[Tensor], Tensor]
_BLOCK = 64  # weights that share a scale in bitsandbytes' nf4


class DecoderModel(nn.Module):
    """Projector and language model. Trained parameters are named `projector.*` and `language.*`.

    projector: None for a decoder without a vision tower. language: transformers' model, or peft's around it.
    """

    def __init__(self, description: DecoderSpec, projector: Projector | None, language: Any) -> None:
        super().__init__()
        self.description = description
        self.projector, self.language = projector, language
        # Sampling, penalties and lengths that come with a model of the hub would be mixed into `generate`. Its end tokens are kept: a
        # chat model ends its turns with one that is not its tokenizer's end token.
        tokenizer, ends = description.tokenizer, description.ends
        self.plain.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=ends[0] if len(ends) == 1 else list(ends), pad_token_id=tokenizer.pad_token_id
        )

    def train(self, mode: bool = True) -> DecoderModel:
        """A language model that is frozen as a whole stays in evaluation mode, without dropout."""
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
        """P, the tokens of one image in a conversation; 0 without a vision tower."""
        return 0 if self.projector is None else self.projector.image_tokens

    @property
    def plain(self) -> Any:
        """transformers' own model."""
        return self.language.get_base_model() if self.adapted else self.language

    @property
    def adapted(self) -> bool:
        return hasattr(self.language, "peft_config")

    def forward(
        self,
        visual_tokens_BVC: Tensor | None,
        ids_BL: Tensor,
        attend_BL: Tensor,
        image_mask_BL: Tensor,
        labels_BL: Tensor,
        divergence: Divergence | None = None,
    ) -> dict[str, Tensor]:
        """`answer_nll` (B,), float32: -log p summed over the learned tokens of each question; `answer_tokens` (B,): how many there are.

        divergence: from a teacher's, of the logits of the learned tokens, row after row; its sums by question are `answer_kl` (B,).
        labels_BL: the ids where they are learned, -100 elsewhere; position t is predicted from those before it. attend_BL: False is
        padding. visual_tokens_BVC: of every row, None without a vision tower. A row without an image has a zero gradient there: all
        ranks run the same modules, whichever of them has images.
        Differentiated: the visual tokens, the projector, and of the language model what is trained.
        """
        learned_BL, next_BL = labels_BL[:, 1:] != IGNORED, labels_BL[:, 1:]
        # float32 for the learned tokens only: the logits of all B * L tokens, with a vocabulary of 152,000, fill the memory.
        logits_NW = self.answer_logits(visual_tokens_BVC, ids_BL, attend_BL, image_mask_BL, labels_BL).float()
        losses = {"answer_nll": F.cross_entropy(logits_NW, next_BL[learned_BL], reduction="none")}
        if divergence is not None:
            losses["answer_kl"] = divergence(logits_NW)
        row_N = learned_BL.nonzero()[:, 0]
        sums = {name: loss_N.new_zeros(len(ids_BL)).index_add(0, row_N, loss_N) for name, loss_N in losses.items()}
        return {**sums, "answer_tokens": learned_BL.sum(dim=1).float()}

    def answer_logits(
        self, visual_tokens_BVC: Tensor | None, ids_BL: Tensor, attend_BL: Tensor, image_mask_BL: Tensor, labels_BL: Tensor
    ) -> Tensor:
        """(N, W) in the language model's type: what predicts each learned token, row after row; W, its output layer's rows."""
        embeddings_BLH = self.embed(visual_tokens_BVC, ids_BL, image_mask_BL)
        output = self.language(inputs_embeds=embeddings_BLH, attention_mask=attend_BL.long(), use_cache=False)
        logits_NW: Tensor = output.logits[:, :-1][labels_BL[:, 1:] != IGNORED]
        return logits_NW

    @torch.no_grad()
    def generate(
        self, visual_tokens_BVC: Tensor | None, ids_BL: Tensor, attend_BL: Tensor, image_mask_BL: Tensor, max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy answers to prompts that are padded on the left: token ids before the first end token.

        Raises ValueError where a logit is NaN: the greedy choice among such logits would be an arbitrary token.
        """
        ends = self.description.ends
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=list(ends), pad_token_id=ends[0]
        )
        nan_watch = _NanWatch()
        with evaluating(self):
            generated = self.language.generate(
                inputs_embeds=self.embed(visual_tokens_BVC, ids_BL, image_mask_BL),
                attention_mask=attend_BL.long(),
                generation_config=settings,
                logits_processor=LogitsProcessorList([nan_watch]),
            )
        if bool(nan_watch.found):
            raise ValueError(
                "the decoder's logits are NaN: its weights, the tower's or the projector's are damaged, or the training has diverged; "
                "take an earlier checkpoint, or lower optim.lr"
            )
        return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in generated.tolist()]

    def embed(self, visual_BVC: Tensor | None, ids_BL: Tensor, image_mask_BL: Tensor) -> Tensor:
        """(B, L, H): token embeddings, with a row's image tokens in the places that its mask marks, in order."""
        text_BLH: Tensor = self.plain.get_input_embeddings()(ids_BL)
        if self.projector is None:
            assert visual_BVC is None, "a decoder without a vision tower was given visual tokens"
            return text_BLH
        assert visual_BVC is not None, "a decoder with a vision tower runs its projector in every forward: give it blank images"
        image_BPH = self.projector(visual_BVC).to(text_BLH.dtype)
        marked_B = image_mask_BL.sum(dim=1)
        assert bool(((marked_B == 0) | (marked_B == image_BPH.shape[1])).all()), f"places of images: {marked_B.tolist()}"
        nth_BL = (image_mask_BL.long().cumsum(dim=1) - 1).clamp(min=0)
        image_BLH = image_BPH.gather(1, nth_BL[..., None].expand(*nth_BL.shape, text_BLH.shape[2]))
        # Not a product with the mask: a blank image may become infinite in bf16, and 0 * inf is NaN.
        return torch.where(image_mask_BL[..., None], image_BLH, text_BLH)

    def write_language(self, folder: Path) -> None:
        """Write the language model and its tokenizer as a transformers folder, without adapters: `decoder.model = FOLDER` reads it.

        The model must not be partitioned by ZeRO-3.
        """
        assert self.settings.quantise == "none", "quantised weights are known by their source, not written"
        with _no_progress_bar():
            self.plain.save_pretrained(folder, state_dict=lora.own_weights(self.plain))
        decoder_tokenizer.write(self.tokenizer, folder)


class _NanWatch(LogitsProcessor):  # type: ignore[misc]
    """Leaves logits as they are and notes whether one was NaN; on the device, so that no token waits for a transfer."""

    def __init__(self) -> None:
        self.found: Tensor | bool = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.found = scores.isnan().any() | self.found
        return scores


def build(description: DecoderSpec, tower: nn.Module | None, device: torch.device, dtype: torch.dtype = torch.float32) -> DecoderModel:
    """The decoder with its weights on `device`. tower: the vision tower that it reads, open_clip's `clip.visual`; None for none.

    On the meta device nothing is read, and every mistake except those in the weights is found. dtype: of the language model; projector
    and adapters are float32 until an engine casts them. Random weights draw from torch's global generator: seed it before. Only what
    `decoder.adapt` trains requires gradients.
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
    return DecoderModel(description, projector, language).train()


def _language(description: DecoderSpec, device: torch.device, dtype: torch.dtype) -> Any:
    settings = description.settings
    if settings.model is None or device.type == "meta":
        return AutoModelForCausalLM.from_config(description.config, dtype=dtype).to(device)
    try:
        with _no_progress_bar():
            language, report = AutoModelForCausalLM.from_pretrained(
                settings.model,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **_quantised(settings.quantise, device, dtype),
            )
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"decoder.model = {settings.model!r}, quantise = {settings.quantise!r}: cannot be loaded: {error}") from error
    # transformers initialises missing weights at random, with a warning.
    if missing := [*report["missing_keys"], *report["mismatched_keys"]]:
        shown = ", ".join(sorted(map(str, missing))[:3])
        raise ValueError(f"decoder.model = {settings.model!r}: its weights do not fit its config.json ({shown}, ...)")
    if settings.quantise == "nf4" and device.type == "cpu":
        # bitsandbytes 0.50 repacks weights for some CPUs at the first forward, and fails on rows that are no multiple of a block.
        for name, module in language.named_modules():
            if type(module).__name__ == "Linear4bit" and module.in_features % _BLOCK:
                raise ValueError(
                    f"decoder.quantise = 'nf4': {name} has {module.in_features} inputs, and on a CPU they must be a multiple of {_BLOCK}: "
                    f"take 'int8' or 'none'"
                )
    return language if settings.quantise != "none" else language.to(device)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers' bars would be drawn over the run's own console."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _quantised(kind: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained` by which bitsandbytes quantises while it loads: the device never holds the full weights."""
    if kind == "none":
        return {}
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else nf4))  # type: ignore[arg-type]
    return {"quantization_config": config, "device_map": {"": device}}
