"""The section about optimisation: AdamW and the run's length."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megakd.recipe.section import FloatPair, Fraction, NonNegative, Positive, PositiveFloat, Section, Weight


class Optim(Section):
    """AdamW, its schedule, and the length of the run."""

    steps: Positive = Field(description="optimiser steps of the whole run")
    batch: Positive = Field(description="global batch: pairs in one optimiser step, over all ranks")
    lr: PositiveFloat = Field(description="peak learning rate: after the warm-up")
    warmup: NonNegative = Field(0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="of the learning rate after the warm-up")
    final_lr: Fraction = Field(0.0, description="learning rate at the end of the cosine, as a fraction of lr")
    betas: FloatPair = Field((0.9, 0.98), description="decay of AdamW's averages of the gradient and of its square")
    eps: PositiveFloat = Field(1e-6, description="AdamW's addend to the root of the second average")
    weight_decay: Weight = Field(0.2, description="on matrices alone: norms, biases, embeddings' scales have none")
    clip: Weight = Field(1.0, description="largest global gradient norm; 0 does not clip")

    @model_validator(mode="after")
    def _betas_decay_and_warmup_fits(self) -> Optim:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)}: give two decays of at least 0 and below 1, for example [0.9, 0.98]")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup} does not end before steps = {self.steps}: lower warmup or raise steps")
        return self
