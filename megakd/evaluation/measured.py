"""Parameters, bytes and inference images/s of the models that a table of scores is about."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import nn

from megakd.data.transforms import input_size
from megakd.evaluation.encoder import Encoder
from megakd.models import clip, pretrained, streaming
from megakd.models.clip import parameters_in
from megakd.models.int8 import convert, matmul
from megakd.recipe import Recipe
from megakd.runtime import collectives, precision, watchdog
from megakd.runtime.launch import World
from megakd.teachers import build
from megakd.teachers.base import settings_of

_MOST_BYTES = 8 * 2**30  # of a teacher that is loaded to be timed
_SECONDS, _MOST_BATCH = 2.0, 64
Measured = dict[str, Any]


def bytes_in(module: nn.Module) -> int:
    """Of parameters and buffers as they lie in memory, tied ones once; on torch's meta device as they would."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def of(module: nn.Module, images_per_second: float | None, *, model: str, parameters: int | None = None) -> Measured:
    """{"model", "parameters", "bytes", "images_per_second"}. parameters: of a model in 8 bit, which has scales beside them."""
    counted = parameters_in(module) if parameters is None else parameters
    return {"model": model, "parameters": counted, "bytes": bytes_in(module), "images_per_second": images_per_second}


def teachers(recipe: Recipe, world: World) -> dict[str, Measured]:
    """Of each of a recipe's teachers, by its role, as `of`; "not_measured" says why there are no images/s. A collective.

    Sizes are those of its architecture in the form in which training holds it; its speed is that of some batches of noise, where its
    weights are on this machine.
    """
    found = {}
    for role in recipe.weighted_teachers():
        found[role] = collectives.by_main(partial(_size, recipe, role, world), world)
        if "not_measured" not in found[role]:
            try:
                found[role]["images_per_second"] = _images_per_second(recipe, role, world)
            except ValueError as error:  # of weights that do not fit, on every rank
                found[role]["not_measured"] = str(error)
    return found


def _size(recipe: Recipe, role: str, world: World) -> Measured:
    """Without a speed, and with the reason where it cannot be timed."""
    settings = recipe.weighted_teachers()[role]
    named: Measured = {"model": settings.model or "own architecture", "parameters": None, "bytes": None, "images_per_second": None}
    try:
        description = clip.resolve(settings, role)
        with torch.device("meta"):
            outline = clip.build(description, torch.device("meta"), precision.of(world.device), load_weights=False).clip
        parameters = parameters_in(outline)
        if settings.int8:
            convert.quantise(outline, threshold=settings.outlier_threshold)
        named = of(outline, None, model=named["model"], parameters=parameters)
        reason = _why_not_timed(description, named["bytes"])
    except ValueError as error:  # a folder that is gone by now, for one
        reason = str(error)
    return named if reason is None else named | {"not_measured": reason}


def _why_not_timed(description: clip.ModelSpec, size: int) -> str | None:
    settings = settings_of(description)
    if settings.placement != "replicated":
        return f"its weights are held otherwise than whole on a device (mode = {settings.mode!r})"
    if not pretrained.is_random(settings) and pretrained.weights_file(settings, download=False) is None:
        return "its weights are not on this machine"
    if size > _MOST_BYTES:
        return f"it takes {size / 2**30:.1f} GiB; `megakd evaluate --model` scores and times it"
    return None


def _images_per_second(recipe: Recipe, role: str, world: World) -> float:
    settings = recipe.weighted_teachers()[role]
    description = clip.resolve(settings, role)
    watchdog.beat(f"timing {description.role}")
    torch.manual_seed(recipe.seed + 1)  # of random weights
    int8 = None
    if settings.int8:
        int8 = streaming.Int8(settings.outlier_threshold, matmul.resolved(settings.int8_product, world.device))
    loaded = build.load(description, world, int8).towers
    if loaded.originals is not None:
        loaded.originals.close()
    encoder = Encoder(loaded.clip, loaded.preprocess, description.tokenize, world.device, recipe.evaluation.batch)
    noise = torch.randint(0, 256, (min(encoder.batch, _MOST_BATCH), 3, *input_size(loaded.preprocess)), dtype=torch.uint8)
    encoder.encode_pixels(noise)  # the first one allocates, and compiles
    images, start = 0, time.perf_counter()
    while not images or time.perf_counter() - start < _SECONDS:
        images += len(encoder.encode_pixels(noise))
    return images / (time.perf_counter() - start)
