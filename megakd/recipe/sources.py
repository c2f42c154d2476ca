"""Where training samples come from: patterns of shards alone, or several sources by name, each with a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from megakd.recipe.section import MOST, Name, Section, Weight

SourceWeight = Annotated[
    Annotated[Weight, Field(le=MOST)] | None,
    Field(
        description="its share of each batch, beside the other sources'; 0 draws nothing from it; all sources have one or none has, and "
        "they then count by their sizes"
    ),
]


class PairSource(Section):
    """One of several sources of image-text pairs."""

    shards: str | list[str] = Field(min_length=1, description="paths or URLs, written as data.train without a table")
    weight: SourceWeight = None


_TABLE = TypeAdapter(dict[Name, PairSource])


def patterns_or_sources(value: Any) -> Any:
    """One message for what is neither patterns nor a table, and the table's own messages for a table."""
    if not isinstance(value, dict):
        patterns = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError("give patterns of shards, as text or a list, or a table of sources, each as [data.train.NAME] with shards")
        return value
    if not value:
        raise ValueError("an empty table: name one source at least, as [data.train.NAME] with shards")
    if loose := [name for name, one in value.items() if not isinstance(one, dict | PairSource)]:
        raise ValueError(f"{loose[0]!r} is no table: each source is one, [data.train.NAME] with its shards and perhaps a weight")
    table = _TABLE.validate_python(value)
    check_weights({name: source.weight for name, source in table.items()})
    return table


def shares_in_words(key: str, weights: Mapping[str, float | None]) -> str:
    """What each batch has of the sources that `key` names, as far as the recipe alone tells."""
    total = sum(weight or 0.0 for weight in weights.values())
    if not total:
        return f"{key}: {', '.join(weights)}, each in proportion to its size"
    return f"{key}: " + ", ".join(f"{name} {(weight or 0.0) / total:.2%}" for name, weight in weights.items()) + " of each batch"


def check_weights(weights: Mapping[str, float | None]) -> None:
    """Raises ValueError where some sources have a weight and others none, of which sizes are no measure, and where all sum to 0."""
    given = [name for name, weight in weights.items() if weight is not None]
    without = [name for name in weights if name not in given]
    if given and without:
        raise ValueError(
            f"{given[0]}.weight is given and {without[0]}.weight is not: give every source a weight, or none, and they count by their sizes"
        )
    if given and not any(weights.values()):
        raise ValueError(f"the weights of {', '.join(given)} sum to 0, so nothing would be drawn: give one of them a weight above 0")
