"""Which tensor of a file belongs to which name of a model: one answer, and one refusal, for every way to load weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import resize_text_pos_embed
from torch import Tensor, nn

from megakd.models import names, resolution, transformers_tower
from megakd.models.casts import SCALARS
from megakd.models.image_only import SAVED_ONCE, ImageModel
from megakd.models.transformers_tower import TransformersTower
from megakd.models.weight_kinds import check_values
from megakd.models.weights import InMemory, Shape, Weights, listed
from megakd.recipe import texts

log = logging.getLogger("megakd.models")

APPLE = "image_encoder.model."
_OF_TEXT = ("positional_embedding", "text.positional_embedding")


@contextlib.contextmanager
def errors_of(role: str) -> Iterator[None]:
    """Messages of ValueErrors raised inside begin with the role of the model whose weights are loaded."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{role}: {error}") from error


class Match:
    """The tensors of a file under the names of a model. Only names and shapes are looked at before `read`."""

    def __init__(self, role: str, config: Mapping[str, Any], model: nn.Module, expected: Mapping[str, Shape], weights: Weights) -> None:
        """role: for messages; config: open_clip's of the model; model: before it was made int8; expected: names and shapes of its state.

        Raises ValueError with the names that are missing, not of this model, or of another shape, and for weights whose own
        configuration names another activation than the model's.
        """
        program = names.program(weights.shapes)
        check_activation(config, weights)
        self._floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        self._model, self._expected, self._role = model, expected, role
        self._weights = names.as_open_clips(by_open_clips_layout(model, weights, expected), expected)
        shapes = self._weights.shapes
        absent = expected.keys() - shapes.keys()
        # A model for a sigmoid loss started from weights without a bias: open_clip begins at 0.
        self._zeros = {"logit_bias"} & absent
        misfits = [name for name in expected if name in shapes and not self._fits(name)]
        problems = {
            "missing": listed(absent - self._zeros),
            "not of this model": listed(shapes.keys() - expected.keys()),
            "of another shape": listed(f"{name} {shapes[name]} instead of {expected[name]}" for name in misfits),
        }
        if summary := "; ".join(f"{kind}: {tensors}" for kind, tensors in problems.items() if tensors):
            others = f" Its names are those of {program}." if program in names.FOREIGN.values() else ""
            if isinstance(model, ImageModel) and "timm_model_name" in config["vision_cfg"]:
                others = f" timm converts some files as it reads them: for such {SAVED_ONCE}."
            raise ValueError(f"{weights.origin}: these are not the weights of this architecture. {summary}.{others}")
        for name in self.resized:
            log.warning("%s: %s is interpolated from %s to %s positions", weights.origin, name, shapes[name][-2], expected[name][-2])

    def _fits(self, name: str) -> bool:
        have, want = self._weights.shapes[name], self._expected[name]
        if have == want or (name in SCALARS and torch.Size(have).numel() == 1):
            return True
        if name in _OF_TEXT:
            return len(have) == len(want) == 2 and have[1] == want[1] and have[0] > 0
        return resolution.fits(name, have, want, self._model)

    @property
    def resized(self) -> list[str]:
        """Names whose tensors are interpolated."""
        shapes = self._weights.shapes
        return [name for name, shape in self._expected.items() if name not in SCALARS and shapes.get(name, shape) != shape]

    def read(self, name: str) -> Tensor:
        """The file's tensor in the model's shape, in the file's type. Raises ValueError when it holds what no trained model does."""
        expected, origin = self._expected[name], self._weights.origin
        if name in self._zeros:
            return torch.zeros(expected)
        with errors_of(self._role):
            tensor = self._weights.read(name)
            if tensor.dtype == torch.float64:
                tensor = tensor.float()  # what is too large for float32 becomes infinite, which `check_values` refuses
            if name in self._floating and not tensor.is_floating_point():  # integers of a quantised file
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{origin}: {name} is of type {kind}; a model is loaded from weights in 16 or 32 bits")
            check_values(name, tensor, origin)
            if tensor.shape == expected or name in SCALARS:
                return tensor.reshape(expected)
            resized = interpolated(name, tensor, self._model)
            if resized.shape != expected:
                raise ValueError(f"{origin}: {name} of shape {tuple(tensor.shape)} cannot be resized to {expected}")
            return resized

    def read_into(self, model: nn.Module) -> None:
        """Copy all values into a model that is in memory, in the model's types. Raises ValueError as `read` does."""
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(self.read(name))


def interpolated(name: str, tensor: Tensor, model: nn.Module) -> Tensor:
    """Positions in the model's shape, in float32: open_clip's own interpolation for another context, `resolution`'s for another size."""
    if name in _OF_TEXT:
        state = {name: tensor.float()}
        resize_text_pos_embed(state, model)
        return state[name]
    resize = resolution.resizer(name, model)
    assert resize is not None, f"{name}: fits"
    return resize(tensor)


def check_activation(config: Mapping[str, Any], weights: Weights) -> None:
    """Raises ValueError where a file, or the config.json beside it, tells which GELU it was trained with, and the model has the other."""
    program = names.program(weights.shapes)
    quick = bool(config.get("quick_gelu"))
    remedy = "take the model's -quickgelu name, or quick_gelu = true in its architecture"
    if program == names.OPENAI and not quick:
        raise ValueError(f"{weights.origin}: OpenAI's own weights, trained with QuickGELU, and this model has GELU: {remedy}")
    if program != names.TRANSFORMERS or {"timm_model_name", "transformers"} & config["vision_cfg"].keys():
        return
    beside = Path(weights.origin).with_name("config.json")
    if not beside.is_file():
        kind = "QuickGELU" if quick else "GELU"
        log.warning("%s: no config.json beside it says which activation it was trained with; %s is assumed", weights.origin, kind)
        return
    settings = texts.read_json(beside, str(beside))
    for tower in ("vision_config", "text_config"):
        part = settings.get(tower) if isinstance(settings, dict) else None
        activation = part.get("hidden_act", "quick_gelu") if isinstance(part, dict) else "quick_gelu"  # transformers' default
        if (activation == "quick_gelu") != quick:
            told = remedy if not quick else "take the model's name without -quickgelu, or quick_gelu = false in its architecture"
            raise ValueError(
                f"{weights.origin}: {beside.name} says hidden_act = {activation!r} in {tower}, and this model has another: {told}"
            )


def by_open_clips_layout(model: nn.Module, weights: Weights, expected: Mapping[str, Shape]) -> Weights:
    """Files that hold a model in another way than as towers of a CLIP."""
    if isinstance(model, ImageModel) and isinstance(model.visual, TransformersTower):
        return transformers_tower.renamed(weights, expected, names.TRUNK)
    if isinstance(model, ImageModel):
        return names.as_trunk(weights, expected, classifiers(model.visual.trunk))
    return _from_apple(model, weights)


def classifiers(trunk: Any) -> tuple[str, ...]:
    """Names of the last layers of timm's model, which tell classes apart."""
    named = trunk.pretrained_cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _from_apple(model: nn.Module, weights: Weights) -> Weights:
    """Apple's own files of MobileCLIP, converted as open_clip does it, at once: the models are small."""
    if not any(name.startswith(APPLE) for name in weights.shapes):
        return weights
    state = {name: weights.read(name) for name in weights.shapes}
    try:
        converted = convert_state_dict(model, state)
    except (KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise ValueError(f"{weights.origin}: named as Apple's MobileCLIP, and not converted ({type(error).__name__}: {error})") from None
    return InMemory(converted, weights.origin)
