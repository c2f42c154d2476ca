"""`--dry_run`: what a run would do, shown and checked without training and without one weight loaded."""

from __future__ import annotations

import json

import torch

from megakd.data.loader import train_batches
from megakd.data.views import TowerView
from megakd.job import Plan
from megakd.models import towers
from megakd.runtime.launch import World


def show(plan: Plan, world: World) -> str:
    """The resolved recipe and DeepSpeed configuration, the first samples, and each model's shapes, computed on torch's meta device.

    Raises ValueError for what only shows when samples are decoded and shapes meet.
    """
    parts = [
        f"recipe ({plan.request.recipe_name}):\n{_indented(plan.request.recipe.model_dump(mode='json', exclude_none=True))}",
        f"DeepSpeed configuration ({plan.config_name}):\n{_indented(plan.config)}",
        f"run folder: {plan.request.out}",
    ]
    descriptions = {"student": plan.student} | plan.teachers
    built = {role: _on_meta(description) for role, description in descriptions.items()}
    views = {role: TowerView(found.preprocess, found.description.tokenize) for role, found in built.items()}
    with train_batches(
        plan.shards,
        plan.order,
        plan.request.recipe.views,
        views,
        rank=world.rank,
        world=world.size,
        start_position=0,
        workers=0,
        pin_memory=False,
    ) as batches:
        batch = next(batches)
    first = f"first batch of this rank: {len(batch)} pairs, bad: {batch.bad.by_reason() or 'none'}"
    parts.append(f"data: {len(plan.shards)} samples in {len(plan.shards.names)} shards; {first}")
    for role, found in built.items():
        parts.append(_shapes(role, found, batch.pixels[role][:2], batch.tokens[role][:2]))
    return "\n".join(parts)


def _on_meta(description: towers.Description) -> towers.Towers:
    with torch.device("meta"):
        return towers.build(description, torch.device("meta"), load_weights=False)


def _shapes(role: str, found: towers.Towers, pixels: torch.Tensor, tokens: torch.Tensor) -> str:
    with torch.no_grad():
        image = found.clip.encode_image(pixels.to("meta", torch.float32))  # type: ignore[operator]
        text = found.clip.encode_text(tokens.to("meta"))  # type: ignore[operator]
    shapes = [tuple(tensor.shape[1:]) for tensor in (pixels, image, tokens, text)]
    count = towers.parameters_in(found.clip)
    return f"{role}: {count:,} parameters; pixels {shapes[0]} -> {shapes[1]}, tokens {shapes[2]} -> {shapes[3]}"


def _indented(content: object) -> str:
    return "\n".join("  " + line for line in json.dumps(content, indent=2).splitlines())
