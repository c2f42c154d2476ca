"""How `data.captions` spells where a sample's captions are, and `data.clean` what is taken out of them.

txt                 the text of the member .txt; of every other extension that holds plain text likewise
txt:lines           each line of that member is a caption
json:re_caption     a text, or a list of texts, in the member .json; syn.json:syn_text of the member .syn.json
json:a.b.0          the first entry of b inside a; a name goes into every entry of a list on its way
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator

from megakd.recipe.section import Weight

MOST_SOURCES = 16
LINES = "lines"
CleanStep = Literal["tags", "urls", "lower"]
STEPS: tuple[CleanStep, ...] = get_args(CleanStep)  # in the order in which they are taken
_NO_TEXT = ("json", "cls", "jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "npy", "npz", "pth", "gz", "parquet")
_SPELLINGS = "write an extension such as txt, 'txt:lines' where each line is a caption, or 'json:FIELD' for a field of the .json member"


@dataclass(frozen=True)
class CaptionSource:
    """Where captions are. member: an extension; lines: whether each of its lines is one; path: of a field of JSON, None of plain text."""

    member: str
    lines: bool = False
    path: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return f"{self.member}:{LINES}" if self.lines else self.member if self.path is None else f"{self.member}:{'.'.join(self.path)}"


def extension(spelled: str) -> str:
    """As in the members' names, without the dot before it."""
    return spelled.lower().lstrip(".")


def check_member(spelled: str) -> str:
    """`spelled`, an extension of members that hold plain text. Raises ValueError for any other."""
    name = extension(spelled)
    kind = name.rpartition(".")[2]
    if kind == "json":
        raise ValueError(
            f"{spelled!r} would train on the text of the JSON itself; name the field that holds the captions: "
            f'data.captions = {{ "{name}:FIELD" = 1 }}'
        )
    if kind in _NO_TEXT:
        raise ValueError(
            f"{spelled!r} would train on what is no plain text; write the captions into .txt members (img2dataset's "
            f"--caption_col does), or give the extension that they have"
        )
    if not _is_extension(name):
        raise ValueError(f"{spelled!r}: give the extension of the captions' members, such as txt; patterns are not read")
    return spelled


def source(spelled: str) -> CaptionSource:
    """The source of this spelling. Raises ValueError for another one."""
    member, colon, rest = spelled.partition(":")
    name = extension(member)
    if not colon:
        return CaptionSource(extension(check_member(member)))
    if name.rpartition(".")[2] != "json":
        if rest != LINES:
            raise ValueError(f"{spelled!r}: fields are those of JSON, and .{name} is none; {_SPELLINGS}")
        return CaptionSource(extension(check_member(member)), lines=True)
    path = tuple(rest.split("."))
    if not _is_extension(name) or not all(part.strip() for part in path):
        raise ValueError(f"{spelled!r}: names no field; {_SPELLINGS}, 'json:a.b' for b inside a")
    return CaptionSource(name, path=path)


def shares(captions: Mapping[str, float]) -> dict[CaptionSource, float]:
    """What is drawn of each source, together 1, in the order of their names, so that a recipe's order changes nothing."""
    total = sum(captions.values())
    found = {source(spelled): weight / total for spelled, weight in captions.items() if weight}
    return dict(sorted(found.items(), key=lambda item: item[0].name))


def _is_extension(name: str) -> bool:
    return bool(name) and all(letter.isalnum() or letter in "._-+" for letter in name)


def _are_sources(captions: dict[str, float]) -> dict[str, float]:
    if not 0 < len(captions) <= MOST_SOURCES:
        raise ValueError(f'{len(captions)} sources: give 1 to {MOST_SOURCES}, as in captions = {{ txt = 0.5, "json:re_caption" = 0.5 }}')
    spelled: dict[CaptionSource, str] = {}
    for name in captions:
        one = source(name)
        if one in spelled:
            raise ValueError(f"{spelled[one]!r} and {name!r} are one source; give it one weight")
        spelled[one] = name
    if not sum(captions.values()) > 0:
        raise ValueError(f"{captions}: the weights sum to 0, so no caption would ever be drawn; give one a weight above 0")
    return captions


def _are_steps(given: Any) -> Any:
    """One message for what is no step; the steps in the order in which they are taken, so that a recipe's order changes nothing."""
    if not isinstance(given, list):
        return given
    if unknown := [step for step in given if step not in STEPS]:
        raise ValueError(
            f"{unknown[0]!r} is no step; known are {', '.join(STEPS)}. Broken encodings (ftfy), HTML entities and white space are what "
            "every tokenizer of open_clip cleans itself"
        )
    if len(set(given)) < len(given):
        raise ValueError(f"{given}: a step is there twice; take it out")
    return [step for step in STEPS if step in given]


CaptionWeights = Annotated[dict[str, Weight], AfterValidator(_are_sources)]
CleanSteps = Annotated[list[CleanStep], BeforeValidator(_are_steps)]
