"""`--dry_run`: what a run would do, shown and checked without training and without one weight loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from megakd.data.pairs import train_batches
from megakd.data.transforms import TowerView
from megakd.models import clip
from megakd.recipe import Recipe
from megakd.runtime.launch import World
from megakd.training.prepare import AnswerData, PairData, PreparedRun, on_meta


def show(plan: PreparedRun, world: World) -> str:
    """The resolved recipe and DeepSpeed configuration, a line a section; then in a few lines what would run, on what data, and each
    model's shapes, computed on torch's meta device.

    Raises ValueError for what only shows when samples are decoded and shapes meet.
    """
    recipe = plan.request.recipe
    settings = recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    parts = [
        f"recipe ({plan.request.recipe_name}), without defaults:\n{_indented(settings)}",
        f"DeepSpeed configuration ({plan.config_name}):\n{_indented(plan.config)}",
        f"run folder: {plan.request.out}",
        f"would run: {_outline(plan, world)}",
    ]
    if plan.pairs is not None:
        parts += _first_batch(plan, plan.pairs, world)
    if plan.questions is not None:
        parts += [_decoder(plan.questions, plan.request.recipe), *_questions(plan.questions)]
    return "\n".join(parts)


def _outline(plan: PreparedRun, world: World) -> str:
    recipe, config = plan.request.recipe, plan.config
    accumulation = f"{world.size} ranks x {config.micro_batches} x {config.micro_batch}"
    seen = recipe.optim.steps * recipe.samples_in_a_step()
    learned = "pairs" if recipe.objectives.active() else "questions"
    objectives = ", ".join(f"{weight:g} {name}" for name, weight in recipe.objectives.active().items()) or "answers"
    how = f"ZeRO {config.stage}, {config.precision}; {objectives}"
    return f"{recipe.optim.steps} steps of batch {recipe.optim.batch} = {accumulation}, {seen:,} {learned} in all; {how}"


def _first_batch(plan: PreparedRun, pairs: PairData, world: World) -> list[str]:
    assert plan.student is not None, "pairs are for a student to learn from"
    built = {role: on_meta(description) for role, description in {"student": plan.student, **pairs.teachers}.items()}
    views = {role: TowerView(model.preprocess, model.description.tokenize) for role, model in built.items()}
    with train_batches(
        pairs.shards,
        pairs.order,
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
    parts = [f"data: {len(pairs.shards)} samples in {len(pairs.shards.names)} shards; {first}"]
    return parts + [_shapes(role, model, batch.pixels[role][:2], batch.tokens[role][:2]) for role, model in built.items()]


def _decoder(questions: AnswerData, recipe: Recipe) -> str:
    assert recipe.answers is not None
    settings, outline = questions.decoder.settings, questions.outline
    learned = sum(parameter.numel() for parameter in outline.parameters() if parameter.requires_grad)
    budget = recipe.answers.max_length - outline.image_tokens
    return (
        f"decoder: {settings.model or 'own architecture'}, {clip.parameters_in(outline.language):,} parameters with its adapters, "
        f"{learned:,} trained with the projector; an image becomes {outline.image_tokens} tokens, which leaves {budget} of "
        f"{recipe.answers.max_length} to question and answer"
    )


def _questions(questions: AnswerData) -> list[str]:
    first = questions.train[0]
    parts = [*questions.notes, f"questions to learn: {len(questions.train)}, for example {first.text!r} -> {first.answer!r}"]
    return parts + [f"questions to be judged by: {name}, {len(opened.questions)}" for name, opened in questions.sets.items()]


def _shapes(role: str, model: clip.ClipModel, pixels: torch.Tensor, tokens: torch.Tensor) -> str:
    with torch.no_grad():
        image = model.clip.encode_image(pixels.to("meta", torch.float32))  # type: ignore[operator]
        text = model.clip.encode_text(tokens.to("meta"))  # type: ignore[operator]
    shapes = [tuple(tensor.shape[1:]) for tensor in (pixels, image, tokens, text)]
    count = clip.parameters_in(model.clip)
    return f"{role}: {count:,} parameters; pixels {shapes[0]} -> {shapes[1]}, tokens {shapes[2]} -> {shapes[3]}"


def _indented(content: Mapping[str, object]) -> str:
    """One line a section: a page of braces would hide the lines that matter."""
    return "\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()) or "  {}"
