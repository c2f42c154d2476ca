"""The section about optimisation: AdamW, how fast each part of the student learns, and the run's length."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megakd.recipe import texts
from megakd.recipe.parts import Part, check_apart
from megakd.recipe.section import FloatPair, Fraction, NonNegative, Positive, PositiveFloat, Section, Weight

VECTORS = "vectors"  # of `decays`: norms, biases and scales, whichever part they are of
TOWERS = ("image", "text")


def _by_dotted_names(given: Any) -> Any:
    """Names without quotes, which are tables in tables to TOML, as those with."""
    return texts.flat(given) if isinstance(given, dict) else given


def _is_a_decay(given: Any) -> Any:
    """One message for a value that is neither a factor nor a table of them."""
    if given is None:
        return None
    factors = given if isinstance(given, dict) else {TOWERS[0]: given}
    for tower, factor in factors.items():
        if tower not in TOWERS:
            raise ValueError(f"{tower!r} is no tower: {texts.did_you_mean(tower, TOWERS)}give image, text or both")
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
            raise ValueError(
                f"{texts.shown(factor)}: give a factor above 0 and up to 1, such as 0.75, or a table of them as {{ image = 0.75 }}"
            )
    return {tower: float(factor) for tower, factor in given.items()} if isinstance(given, dict) else float(given)


Rates = Annotated[dict[str, PositiveFloat], BeforeValidator(_by_dotted_names)]
Decays = Annotated[dict[str, Weight], BeforeValidator(_by_dotted_names)]
LayerDecay = Annotated[float | dict[str, float] | None, BeforeValidator(_is_a_decay)]


class Ema(Section):
    """An exponential moving average of the weights, beside those that learn: average = decay * average + (1 - decay) * weights.

    It begins with the first weights, and takes in norms' running statistics as well. 4 bytes a trained parameter, shared out as the
    moments are, and another file in each checkpoint.
    """

    decay: float = Field(gt=0, lt=1, allow_inf_nan=False, description="what the average keeps of itself, for example 0.9999")
    every: Positive = Field(1, description="updates of the weights between two of the average")
    warmup: bool = Field(
        False, description="the n-th time, from 1, it keeps (1 + n) / (10 + n) where that is less: first weights are soon forgotten"
    )

    def decay_after(self, updates: int) -> float | None:
        """Of the average, after the update of this number, from 1; None where that is none of its own."""
        times, left = divmod(updates, self.every)
        if left:
            return None
        return min(self.decay, (1 + times) / (10 + times)) if self.warmup else self.decay


class Optim(Section):
    """AdamW, its schedule, and the length of the run."""

    steps: Positive = Field(description="optimiser steps of the whole run")
    batch: Positive = Field(description="global batch: pairs in one optimiser step, over all ranks")
    lr: PositiveFloat = Field(description="peak learning rate: after the warm-up")
    warmup: NonNegative = Field(0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant", "wsd"] = Field(
        "cosine", description="of the learning rate after the warm-up; wsd: stable, then falling over the last `cooldown` steps"
    )
    final_lr: Fraction = Field(0.0, description="learning rate at the end of the cosine or the cooldown, as a fraction of lr")
    cooldown: NonNegative = Field(0, description="wsd: steps at the end in which the learning rate falls to final_lr")
    cooldown_shape: Literal["linear", "cosine", "sqrt"] = Field(
        "linear", description="wsd: how it falls; sqrt: as 1 - sqrt(share of the cooldown), fast at first (arXiv 2405.18392)"
    )
    betas: FloatPair = Field((0.9, 0.98), description="decay of AdamW's averages of the gradient and of its square")
    eps: PositiveFloat = Field(1e-6, description="AdamW's addend to the root of the second average")
    weight_decay: Weight = Field(0.2, description="on matrices alone: norms, biases, embeddings' scales have none")
    clip: Weight = Field(1.0, description="largest global gradient norm; 0 does not clip")
    rates: Rates = Field(
        default_factory=dict,
        description="peak learning rates of parts in place of lr, as answers.lr gives them: image, text, image.embeddings, image.blocks, "
        "image.blocks.0-5, image.head (what follows the blocks), text likewise, scale, heads, heads.NAME; the narrowest name counts",
    )
    layer_decay: LayerDecay = Field(
        None,
        description="multiplies a tower's rates, from its head down, once for each block: its last block's by it, its embeddings' by its "
        "power of blocks + 1; of both towers, or { image = 0.75 }",
    )
    decays: Decays = Field(
        default_factory=dict,
        description="weight decay of the matrices of parts in place of weight_decay, by the names of rates; vectors: of all norms, biases "
        "and scales, which otherwise have none",
    )
    ema: Ema | None = None

    @model_validator(mode="after")
    def _betas_decay_and_warmup_fits(self) -> Optim:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)}: give two decays of at least 0 and below 1, for example [0.9, 0.98]")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup} does not end before steps = {self.steps}: lower warmup or raise steps")
        return self

    @model_validator(mode="after")
    def _cooldown_fits(self) -> Optim:
        if self.schedule != "wsd":
            for key, default in (("cooldown", 0), ("cooldown_shape", "linear")):
                if (value := getattr(self, key)) != default:
                    raise ValueError(f"{key} = {value!r} is for schedule = 'wsd', and schedule is {self.schedule!r}: change one of the two")
        elif not self.cooldown:
            raise ValueError("schedule = 'wsd' falls over its last steps: give their number as cooldown, or set schedule to constant")
        elif self.warmup + self.cooldown > self.steps:
            raise ValueError(
                f"warmup = {self.warmup} and cooldown = {self.cooldown} are more than steps = {self.steps}: lower one of them, or raise "
                "steps"
            )
        return self

    @model_validator(mode="after")
    def _names_are_parts(self) -> Optim:
        for key, table in (("rates", self.rates), ("decays", self.decays)):
            check_apart(key, [Part.read(f"{key}.{name}", name) for name in table if (key, name) != ("decays", VECTORS)])
        return self

    def layer_decay_of(self, tower: str) -> float:
        """1 without one."""
        of = self.layer_decay
        return (of or 1.0) if not isinstance(of, dict) else of.get(tower, 1.0)
