"""What `megakd data check` asks of a recipe: its data, its student's tokenizer, and whether a run reads captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch

from megakd.data.caption_tokens import Tokenize
from megakd.data.check.run import CheckRequest
from megakd.models import clip, image_only
from megakd.models.heads import ModelShape
from megakd.models.tokenizing import tokenizer
from megakd.objectives.set import ObjectiveSet
from megakd.recipe import Recipe, Student, chain
from megakd.recipe import load as recipes


def request(shards: Sequence[str], recipe: str | None, overrides: Sequence[str], samples: int | None, out: Path | None) -> CheckRequest:
    """shards: in the place of the recipe's. Without a recipe: captions are read, and counted in CLIP's own tokens.

    Raises ValueError where nothing names shards, for settings that are wrong, and for a student whose tokenizer cannot be had.
    """
    captions, batch, words = True, None, "CLIP's own tokenizer, 77 at most (--recipe names a student's)"
    tokenize: Tokenize | None
    if recipe is None:
        data = recipes.load_scored(None, overrides).data
        tokenize = open_clip.SimpleTokenizer(context_length=77)
    else:
        loaded, origin = recipes.load(recipe, overrides)
        data, captions = loaded.data, _reads_captions(loaded)
        batch = loaded.optim.batch if loaded.active() else None
        tokenize, words = (
            (None, "")
            if (student := chain.with_text(loaded)) is None
            else (_tokenizer(student), f"the tokenizer of the student of {origin}")
        )
    if shards:
        data = data.model_copy(update={"train": list(shards)})
    if data.train is None:
        raise ValueError(
            "no shards: name them, as in `megakd data check '/data/cc12m/{00000..01242}.tar'`, or give a --recipe with data.train"
        )
    return CheckRequest(data, tokenize, words, captions, batch, samples, out)


def _reads_captions(recipe: Recipe) -> bool:
    """As `tasks/distill.py` has it, by the models' names alone: no weights have to be there."""
    if not recipe.active():
        return True
    teachers = [ModelShape(0, has_text=not image_only.names_one(settings)) for settings in recipe.weighted_teachers().values()]
    return ObjectiveSet(recipe, torch.device("cpu"), None).reads_captions(teachers)


def _tokenizer(student: Student) -> Tokenize | None:
    settings = chain.model(student, "student")
    config, _ = clip.configuration(settings, "student")
    return tokenizer(settings.speaks_as, config, "student") if "text_cfg" in config else None
