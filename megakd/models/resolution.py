"""Towers of a named model for images of another size than its own, `image_size`: what can be built, and how its positions get there.

open_clip's own `force_image_size` is followed: its ViT's positions are interpolated as the weights are read, timm's by timm itself, and
those of a ResNet's attention pooling, which open_clip leaves out, as its ViT's.
Legend: P positions (a class token's first, where there is one), C their width.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import timm
import torch
from open_clip.model import resize_pos_embed
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from megakd.models.architecture import check_whole
from megakd.models.patches import OPEN_CLIP_TIMM
from megakd.recipe import Model, Student

Size = tuple[int, int]
VIT, RESNET, TRUNK = "visual.positional_embedding", "visual.attnpool.positional_embedding", "visual.trunk.pos_embed"
_RESNET_STRIDE = 32


@dataclass(frozen=True)
class Tower:
    """A timm tower as open_clip makes it, with its `timm_*` keys."""

    name: str
    width: int
    pool: str
    proj: str | None

    def on_meta(self) -> Any:
        """At the size of its name, without weights."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return OPEN_CLIP_TIMM(self.name, self.width, pool=self.pool, proj=self.proj or "").eval()  # type: ignore[no-untyped-call]


def resized(config: dict[str, Any], settings: Model, role: str) -> dict[str, Any]:
    """open_clip's `model_cfg` for images of `settings.image_size`; `config` itself for the tower's own size.

    Raises ValueError naming the key: a size that the tower's patches or strides do not divide (with the nearest two), a class whose
    positions are of one size, and for a student a size at which open_clip could not load the trained model again.
    """
    size, vision = settings.image_size, config.get("vision_cfg")
    if size is None or not isinstance(vision, dict):
        return config
    own = vision.get("image_size", 224)
    if size == (tuple(own) if isinstance(own, (list, tuple)) else (own, own)):
        return config
    key = f"{role}.image_size = {list(size)}: {settings.model}"
    changed: dict[str, Any] = {"image_size": size[0] if size[0] == size[1] else list(size)}
    if name := vision.get("timm_model_name"):
        tower = Tower(name, int(config["embed_dim"]), vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear"))
        changed |= _of_timm(tower, size, key, exported=isinstance(settings, Student))
    elif isinstance(vision.get("layers"), (list, tuple)):
        check_whole(size, (_RESNET_STRIDE, _RESNET_STRIDE), key)
        if size[0] != size[1]:
            raise ValueError(f"{key}: open_clip's ResNet takes squares alone; give one number, such as {max(size)}")
    elif isinstance(patch := vision.get("patch_size", 16), int) and patch > 0:
        check_whole(size, (patch, patch), key)
    changed_config = copy.deepcopy(config)
    changed_config["vision_cfg"] |= changed
    return changed_config


def set_size(clip: nn.Module, settings: Model) -> None:
    """Give an open_clip model's timm tower the positions of `settings.image_size`, where it was built with others.

    open_clip builds it at the size of timm's name, whatever its configuration says, and does the same once weights are loaded.
    """
    visual: Any = clip.visual
    if settings.image_size is not None and isinstance(visual, OPEN_CLIP_TIMM) and _own_size(visual.trunk) != settings.image_size:
        visual.set_input_size(settings.image_size)


def resizer(name: str, clip: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What brings a file's positions of the image tower to those of the model, (P, C) or timm's (1, P, C), in float32.

    None for another tensor and for towers of other classes. Raises ValueError for positions that are no square grid.
    """
    visual: Any = clip.visual
    if name == VIT and hasattr(visual, "grid_size"):
        return functools.partial(_by_open_clip, grid=visual.grid_size)
    if name == RESNET:
        return functools.partial(_by_open_clip, grid=math.isqrt(visual.attnpool.positional_embedding.shape[0] - 1))
    if name == TRUNK and isinstance(visual, OPEN_CLIP_TIMM) and hasattr(visual.trunk, "patch_embed"):
        trunk: Any = visual.trunk
        prefix = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
        return functools.partial(_by_timm, grid=list(trunk.patch_embed.grid_size), prefix=prefix)
    return None


def fits(name: str, have: tuple[int, ...], want: tuple[int, ...], clip: nn.Module) -> bool:
    """Whether `resizer` makes the model's shape of the file's: of positions, in a square grid."""
    if resizer(name, clip) is None or len(have) != len(want) or have[-1] != want[-1]:
        return False
    trunk: Any = getattr(clip.visual, "trunk", None)
    prefix = 1 if trunk is None else 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
    count = have[-2] - prefix
    return count > 0 and math.isqrt(count) ** 2 == count and (len(have) == 2 or have[0] == want[0])


def _by_open_clip(positions_PC: Tensor, grid: int | Size) -> Tensor:
    state = {VIT: positions_PC.float()}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
    return state[VIT]


def _by_timm(positions_1PC: Tensor, grid: list[int], prefix: int) -> Tensor:
    resampled: Tensor = resample_abs_pos_embed(positions_1PC.float(), new_size=grid, num_prefix_tokens=prefix)
    return resampled


def _own_size(trunk: Any) -> Size | None:
    """The size that a timm model was built for; None where it takes any."""
    size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    return tuple(size) if size is not None and hasattr(trunk, "set_input_size") else None


@functools.cache
def _of_timm(tower: Tower, size: Size, key: str, *, exported: bool) -> Mapping[str, Any]:
    """What of `vision_cfg` changes beside the size: the name, where timm has another one for the same model at this size."""
    own = tower.on_meta()
    trunk, shapes = own.trunk, _shapes(own)
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    stride = trunk.feature_info[-1]["reduction"] if getattr(trunk, "feature_info", None) else 1
    check_whole(size, tuple(patch) if isinstance(patch, tuple) and hasattr(trunk, "blocks") else (stride, stride), key)
    kind, fixed = type(trunk).__name__, hasattr(trunk, "set_input_size")
    try:
        with torch.no_grad(), torch.device("meta"):
            own.set_input_size(size)
            own(torch.empty(1, 3, *size))
        changed = {name for name, shape in _shapes(own).items() if shape != shapes.get(name)} - {TRUNK.removeprefix("visual.")}
    except Exception as error:  # whatever timm's layers raise for a grid that they do not take
        changed = {str(error)}
    if changed:
        raise ValueError(
            f"{key}: timm's {kind} has positions of one size; take it out, or choose a model with a ViT, an EVA or a convolutional tower"
        )
    if not fixed:
        return {}
    stem = re.sub(r"_\d+$", "", tower.name.partition(".")[0])
    named = {other: timm.get_pretrained_cfg(other) for other in timm.list_models(f"{stem}_*") if re.fullmatch(rf"{stem}_\d+", other)}
    sizes = {other: tuple(cfg.input_size[1:]) for other, cfg in named.items() if cfg is not None}
    for other in (other for other, its in sizes.items() if its == size):
        model = dataclasses.replace(tower, name=other).on_meta()
        if repr(model) == repr(own) and _shapes(model) == _shapes(own):
            return {"timm_model_name": other}
    if exported:
        known = ", ".join(str(its[0]) for its in sorted(set(sizes.values())))
        raise ValueError(
            f"{key}: open_clip builds timm's {kind} at the size of its timm name, so it could not load the trained model again; take a "
            f"size that timm has a name for ({known}), or an open_clip ViT or a convolutional tower"
        )
    return {}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
