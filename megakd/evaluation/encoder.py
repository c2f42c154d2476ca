"""A frozen CLIP model as evaluation sees it: pixels or sentences in, unit embeddings out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from megakd.data.caption_tokens import plain_captions
from megakd.data.transforms import normalise
from megakd.models.casts import pixel_dtype
from megakd.models.student import encode_images, encode_texts
from megakd.runtime import watchdog

# Legend: n samples of one batch, D embedding width.


@dataclass(frozen=True)
class Encoder:
    """`clip` in evaluation mode on `device`, with the preprocessing and the tokenizer that belong to it."""

    clip: nn.Module
    preprocess: PreprocessCfg
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device
    batch: int

    @property
    def dtype(self) -> torch.dtype:
        return pixel_dtype(getattr(self.clip, "visual", self.clip))

    def images(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (n, 3, H, W) -> unit rows (n, D), float32 on the CPU."""
        watchdog.beat("evaluating")
        ready = normalise(pixels.to(self.device, non_blocking=True), self.preprocess, self.dtype)
        return encode_images(self.clip, ready).float().cpu()

    def texts(self, sentences: Sequence[str]) -> Tensor:
        """n sentences -> unit rows (n, D), float32 on the CPU."""
        watchdog.beat("evaluating")
        tokenize = plain_captions(self.tokenize)
        pieces = [sentences[start : start + self.batch] for start in range(0, len(sentences), self.batch)]
        rows = [encode_texts(self.clip, tokenize(list(piece)).to(self.device)).float().cpu() for piece in pieces]
        return torch.cat(rows)
