"""What every section of a recipe has in common: its base class and the types of its values."""

from __future__ import annotations

from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from megakd.recipe.placements import MODES

MOST = 10**9  # of a count; a loader of 10^20 processes would only hang
Positive = Annotated[int, Field(gt=0, le=MOST)]
NonNegative = Annotated[int, Field(ge=0, le=MOST)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
HeadKind = Annotated[
    Literal["auto", "none", "linear", "mlp"],
    Field(
        description="projection of each modality to the teacher's width; none: the student's own embeddings, in the teacher's space; "
        "mlp: with one hidden layer; auto: none at equal widths, else linear"
    ),
]


def _is_a_students_scale(value: Any) -> Any:
    """One message for a value that is neither a name nor a number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value not in ("student", "own") and not (number and 0 < value <= 1e6):
        raise ValueError("give 'student', 'own' or a number above 0 and up to 1e6")
    return value


StudentScale = Annotated[
    float | Literal["student", "own"],
    BeforeValidator(_is_a_students_scale),
    Field(description="logit scale of the student's cosines; student: its learned one; own: a further one, learned beside the head"),
]
Block = Annotated[int, Field(ge=-10_000, le=10_000)]
GridSide = Annotated[int, Field(gt=0, le=10_000)]
if TYPE_CHECKING:
    TeacherMode = str
else:
    TeacherMode = Literal[MODES]
Int8Product = Literal["auto", "dequantise", "bitsandbytes", "int_mm", "onednn"]
# Names become parts of file names, which end at 255 bytes.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=100)]
SetName = Annotated[str, Field(min_length=1, max_length=100)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
MATCHED = "matched"


@dataclass(frozen=True)
class Schedulable:
    """Marks a number that `[schedules]` may move over a run, see `schedules.py`. above_zero: whether 0 is none of its values."""

    above_zero: bool


SCHEDULED_WEIGHT, SCHEDULED_TEMPERATURE = Schedulable(above_zero=False), Schedulable(above_zero=True)
ScheduledWeight = Annotated[Weight, SCHEDULED_WEIGHT]
ScheduledTemperature = Annotated[PositiveFloat, SCHEDULED_TEMPERATURE]
# A list in TOML becomes a fixed-length tuple; strict mode alone would refuse the list.
FloatPair = Annotated[tuple[float, float], Field(strict=False)]
GridSize = Annotated[tuple[GridSide, GridSide], Field(strict=False)]
ImageSize = Annotated[GridSize, BeforeValidator(lambda given: (given, given) if type(given) is int else given)]
Number = Annotated[float, Field(allow_inf_nan=False)]
FloatTriple = Annotated[tuple[Number, Number, Number], Field(strict=False)]


def _is_a_scale(value: Any) -> Any:
    """One message for a value that is neither of the two."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value not in (None, MATCHED) and not (number and 0 < value <= MOST_SCALE):
        raise ValueError(f"a number above 0 and up to {MOST_SCALE:g}, or {MATCHED!r}")
    return value


MOST_SCALE = 1e6  # of logits in float32
Scale = Annotated[float | Literal["matched"] | None, BeforeValidator(_is_a_scale)]


class Section(BaseModel):
    """Unknown keys are errors, and values keep their type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; of any other annotation it alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
