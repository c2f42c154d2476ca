"""What every section of a recipe has in common: its base class and the types of its values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
HeadKind = Annotated[
    Literal["linear", "mlp"], Field(description="projection of each modality to the teacher's width; mlp: with one hidden layer")
]
TeacherMode = Literal["replicated", "replicated_int8", "zero3", "zero3_int8"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# A list in TOML becomes a fixed-length tuple; strict mode alone would refuse the list.
FloatPair = Annotated[tuple[float, float], Field(strict=False)]


class Section(BaseModel):
    """Unknown keys are errors and values keep their type: a recipe never means something else than it says."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
