"""A trained student ready to encode: images, pixels or texts in, unit embeddings out.

Legend: n images or texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor, nn

from megakd.data.bad_samples import BadSample
from megakd.data.caption_tokens import plain_captions
from megakd.data.transforms import as_rgb, evaluation_pixels, normalise, rgb_image
from megakd.models import clip
from megakd.models.casts import pixel_dtype
from megakd.models.pretrained import LOCAL
from megakd.models.student import encode_images, encode_texts
from megakd.recipe import Data, Model
from megakd.recipe.chain import CLIP_CONFIG
from megakd.runtime import watchdog
from megakd.runtime.run_folder import MODEL

T = TypeVar("T")
_DATA = Data()  # nobody says another here


@dataclass(frozen=True)
class Encoder:
    """`clip` in evaluation mode on `device`, with its preprocessing and tokenizer. batch: images or texts that are encoded at once.

    `encode_images` and `encode_texts` give unit rows, so that `images @ texts.T` are cosines; the model was trained on
    `scale * images @ texts.T + (bias or 0)` as logits.
    """

    clip: nn.Module
    preprocess: PreprocessCfg
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device
    batch: int

    @property
    def dtype(self) -> torch.dtype:
        """The type of pixels that the image tower takes."""
        return pixel_dtype(getattr(self.clip, "visual", self.clip))

    @cached_property
    def width(self) -> int:
        """D."""
        return self.encode_texts(["a"]).shape[1]

    @property
    def scale(self) -> float:
        """The factor of the cosines in the logits."""
        model: Any = self.clip
        return float(model.logit_scale.detach().exp())

    @property
    def bias(self) -> float | None:
        """Added to the logits; None for a model without, as a softmax loss trains."""
        bias: Any = getattr(self.clip, "logit_bias", None)
        return None if bias is None else float(bias.detach())

    def encode_images(self, images: Sequence[Image.Image | str | Path]) -> Tensor:
        """n images of any size, or paths of image files -> unit rows (n, D), float32 on the CPU. They are prepared as in evaluation,
        turned upright by EXIF, transparency on white.

        Raises ValueError naming the file for one that is missing, damaged or too large (data.max_pixels' default).
        """
        return self._encode(images, lambda batch: self.encode_pixels(torch.stack([self._pixels(image) for image in batch])))

    def _encode(self, items: Sequence[T], encode: Callable[[Sequence[T]], Tensor]) -> Tensor:
        """(n, D), in batches."""
        batches = [items[start : start + self.batch] for start in range(0, len(items), self.batch)]
        return torch.cat([encode(batch) for batch in batches]) if batches else torch.zeros(0, self.width)

    def _pixels(self, image: Image.Image | str | Path) -> Tensor:
        if isinstance(image, Image.Image):
            try:
                rgb = as_rgb(image, _DATA)
            except BadSample as bad:
                raise ValueError(f"an image of mode {image.mode}: {bad.reason}: {bad}") from bad
        else:
            rgb = read_image(Path(image))
        return torch.from_numpy(evaluation_pixels(rgb, self.preprocess).copy())

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (n, 3, H, W) of the tower's size -> unit rows (n, D), float32 on the CPU."""
        watchdog.beat("evaluating")
        ready = normalise(pixels.to(self.device, non_blocking=True), self.preprocess, self.dtype)
        return encode_images(self.clip, ready).float().cpu()

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """n texts -> unit rows (n, D), float32 on the CPU. Texts longer than the context are cut, as in training."""
        watchdog.beat("evaluating")
        tokenize = plain_captions(self.tokenize)
        return self._encode(texts, lambda batch: encode_texts(self.clip, tokenize(list(batch)).to(self.device)).float().cpu())


def load_model(folder: str | Path, device: torch.device | str | None = None, *, batch: int = 64) -> Encoder:
    """A trained student with its preprocessing and tokenizer, ready to encode images (n, D) and texts (n, D) as unit rows, in float32.

    folder: a finished run, or its `model` folder, or any other folder that open_clip loads as `local-dir:`. device: default a GPU where
    there is one. batch: images or texts encoded at once. The plain open_clip model is `.clip`.

    Raises ValueError naming the folder or file: no model there, weights that do not fit the configuration, a damaged file.

    >>> model = megakd.load_model("runs/mine")
    >>> texts = model.encode_texts(["a red circle", "a blue square"])
    >>> texts.shape
    torch.Size([2, 64])
    >>> images = model.encode_images([Image.new("RGB", (64, 48), "red")])
    >>> cosines = images @ texts.T
    >>> probabilities = (model.scale * cosines).softmax(dim=-1)
    """
    folder = Path(folder)
    model = folder if (folder / CLIP_CONFIG).is_file() else folder / MODEL
    if not (model / CLIP_CONFIG).is_file():
        raise ValueError(
            f"{folder}: no model in it ({CLIP_CONFIG}, or {MODEL}/{CLIP_CONFIG} as a run writes at its end); finish the run first. What a "
            f"run of answers alone leaves is {folder}/bundle, for megakd.load_bundle"
        )
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    description = clip.resolve(Model(model=f"{LOCAL}{model}"), "student")
    built = clip.build(description, where)
    return Encoder(built.clip.eval().requires_grad_(False), built.preprocess, description.tokenize, where, batch)


def read_image(path: Path) -> Image.Image:
    """The image, decoded. Raises ValueError naming the file: missing, no image, damaged, larger than data.max_pixels' default."""
    try:
        return rgb_image(path.read_bytes(), _DATA)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except BadSample as bad:
        raise ValueError(f"{path}: {bad.reason}: {bad}") from bad
