"""A run that begins with the projector and the adapter of an earlier run's bundle (decoder.start), as LLaVA's second stage does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.export import manifest as manifests
from megakd.export.bundle import load_projector
from megakd.export.manifest import ADAPTER, LANGUAGE, PROJECTOR
from megakd.export.references import fingerprint, same_weights
from megakd.models import clip
from megakd.models.vlm import lora
from megakd.models.vlm.decoder import DecoderModel
from megakd.recipe import Decoder


def warm_start(folder: Path, decoder: DecoderModel, tower: clip.ModelSpec | None) -> None:
    """Put the projector and the adapter of the bundle in `folder` into a decoder that was just built. tower: the one that it reads.

    A bundle without an adapter leaves a new one unchanged: alignment trains only the projector. The prompts may differ, as in LLaVA's two
    stages. Raises ValueError as `Bundle.load` does, and when the two decoders differ in language model, projector, adapter, or in the
    vision tower where the bundle has it by reference; a tower that was trained in the bundle's run is not compared.
    """
    manifest, key = manifests.read(folder), f"decoder.start = {str(folder)!r}"
    _check_same_language(folder, manifest, decoder.settings, key)
    if decoder.projector is not None and tower is not None:
        _check_same_view(manifest, decoder.settings, tower, key)
    if (decoder.projector is None) != (PROJECTOR not in manifest["files"]):
        raise ValueError(f"{key}: one of the two decoders has no eyes: give both runs a student, or neither")
    if (folder / ADAPTER).is_dir():
        if not decoder.adapted:
            raise ValueError(
                f"{key}: has an adapter, and decoder.adapt = {decoder.settings.adapt!r} has no place for it: set it to 'lora', or merge "
                f"that bundle (`megakd answer {folder} --merge OUT`) and start from OUT with decoder.model = 'OUT/{LANGUAGE}'"
            )
        lora.load_adapter(decoder.language, folder / ADAPTER)
    load_projector(folder, decoder, key)


def _check_same_language(folder: Path, manifest: dict[str, Any], settings: Decoder, key: str) -> None:
    inside = manifest["language"] is None
    known = fingerprint(str(folder / LANGUAGE)) if inside else manifest["language"]["sha256"]
    if settings.model is None or fingerprint(settings.model) != known:
        right = str(folder / LANGUAGE) if inside else manifest["language"]["model"]
        raise ValueError(f"{key}: was trained on another language model than this run's: set decoder.model = {right!r}")


def _check_same_view(manifest: dict[str, Any], settings: Decoder, tower: clip.ModelSpec, key: str) -> None:
    """A projector fits only the tower, the block and the grid that it was trained on."""
    check_same_grid(manifest["decoder"], settings, key)
    known = manifest["tower"]
    if known is None or known["inside"]:
        return
    if not same_weights(tower.settings, known):
        before = known["settings"]["model"] or known["settings"]["pretrained"]
        raise ValueError(f"{key}: its projector was trained on another vision tower ({before!r}) than this run's: make that the student")


def check_same_grid(before: Mapping[str, Any], settings: Decoder, key: str) -> None:
    """Raises ValueError when a projector trained with the decoder settings `before` would read another block or another grid."""
    for name in ("layer", "image_tokens"):
        was, now = before[name], getattr(settings, name)
        if was != now:
            raise ValueError(f"{key}: its projector was trained with decoder.{name} = {was}, and this run has {now}: set it to {was}")
