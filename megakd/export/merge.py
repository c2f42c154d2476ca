"""A bundle whose adapter is added to its language model's weights, and which refers to nothing: `megakd answer RUN/bundle --merge OUT`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from megakd.export.bundle import Bundle
from megakd.models.vlm.decoder import Decoder


def merge(folder: Path, out: Path) -> None:
    """Write to `out` the bundle in `folder` without references and without an adapter: it is added to the language model's weights.

    `out/language` is a plain transformers folder, in the base's own precision; the sum is taken in float32, also for a quantised base.
    Raises ValueError as `Bundle.load` does, and when `out` is `folder` itself or holds something else.
    """
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out}: is the bundle that is merged; choose another folder")
    loaded = Bundle.load(folder, torch.device("cpu"), quantise="none")
    old = loaded.decoder
    language = old.language.merge_and_unload() if old.adapted else old.language
    dtype = old.description.config.get_text_config().dtype or torch.float32
    for weight in language.parameters():  # buffers keep theirs: rotary tables are float32 in a bf16 model too
        weight.data = weight.data.to(dtype)
    settings = old.settings.model_copy(update={"adapt": "none"})
    merged = Decoder(dataclasses.replace(old.description, settings=settings), old.projector, language)
    dataclasses.replace(loaded, decoder=merged).save(out, tower_inside=True, language_inside=True)
