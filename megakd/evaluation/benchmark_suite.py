"""Lists of evaluation sets with averages over groups of them: `megakd evaluate ... --suite datacomp38 --data FOLDER`.

A set lies in FOLDER/wds_KEY_test or FOLDER/wds_KEY, '/' in its key written '-', laid out as CLIP_benchmark's: class names, templates and
test/*.tar of a zero-shot set, test/*.tar of pairs of a retrieval set. A set that is missing, and one whose own metric is not computed here,
is in no average, and each average says over how many sets it is.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError, model_validator

from megakd.evaluation.image_files import folder_of
from megakd.recipe import Recipe, Section, load, texts
from megakd.recipe.schema import Scored
from megakd.runtime import collectives
from megakd.runtime.launch import World

log = logging.getLogger("megakd.evaluation")
Of = TypeVar("Of", Recipe, Scored)
Kind = Literal["zero_shot", "retrieval"]
_METRICS: dict[Kind, tuple[str, ...]] = {"zero_shot": ("top1", "top5", "mean_per_class_recall", "f1_macro"), "retrieval": ("mean_R@1",)}


class SuiteSet(Section):
    """A set of a suite."""

    name: str = Field(min_length=1, description="for people")
    kind: Kind = Field("zero_shot", description="how it is scored")
    metric: str = Field("top1", description="of its scores the one that counts: top1, top5, mean_per_class_recall, f1_macro; mean_R@1")
    instead: str | None = Field(None, description="the suite's own metric where it is not computed here: the set is then in no average")
    skipped: str | None = Field(None, description="why the set is not scored at all")
    folder: str | None = Field(None, description="of the set below the data's folder; default: wds_KEY_test, or wds_KEY")

    @model_validator(mode="after")
    def _metric_is_of_its_kind(self) -> SuiteSet:
        if self.metric not in _METRICS[self.kind]:
            raise ValueError(f"metric = {self.metric!r}: a {self.kind} set has {', '.join(_METRICS[self.kind])}")
        return self


class SuiteFile(Section):
    """The file as it is written."""

    title: str = Field(min_length=1, max_length=200)
    source: str | None = Field(None, description="where its sets, metrics and groups are from")
    sets: dict[str, SuiteSet] = Field(min_length=1)
    groups: dict[str, list[str]] = Field(default_factory=dict, description="keys of sets by the average's name; an empty list: all sets")

    @model_validator(mode="after")
    def _groups_are_of_sets(self) -> SuiteFile:
        for name, keys in self.groups.items():
            if unknown := [key for key in keys if key not in self.sets]:
                raise ValueError(f"groups.{name}: {texts.did_you_mean(unknown[0], self.sets)}no set is called {unknown[0]!r}")
            if len(set(keys)) < len(keys):
                raise ValueError(f"groups.{name}: a set is in it twice")
        return self


class SuiteChoice(NamedTuple):
    """A suite by its shipped name or its file, and the folder of its sets."""

    source: str
    data: Path | None


@dataclass(frozen=True)
class BenchmarkSuite:
    """A suite whose sets were looked for in a folder. found: the folder of each that is there, by key."""

    spec: SuiteFile
    found: dict[str, Path]

    def added_to(self, wanted: Of) -> Of:
        """What is scored, with the suite's sets beside its own. Raises ValueError for a set of its own with a name of the suite."""
        evaluation = wanted.evaluation
        by_kind: dict[str, dict[str, Any]] = {kind: dict(getattr(evaluation, kind)) for kind in _METRICS}
        for key, folder in self.found.items():
            kind = self.spec.sets[key].kind
            if key in by_kind[kind]:
                raise ValueError(f"evaluation.{kind}.{key}: the suite has a set of this name; take yours out, or give it another name")
            by_kind[kind][key] = str(folder) if kind == "zero_shot" else f"{folder}/test/*.tar"
        return wanted.model_copy(update={"evaluation": evaluation.model_copy(update=by_kind)})

    def scores(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """{"title", "sets": {key: {"name", "metric", "score", "counts", ...}}, "averages": {group: {"score", "over", "sets"}}, "missing"}.

        score: None of a set that is not there or not scored. over: sets that an average is of, out of "sets".
        """
        rows: dict[str, dict[str, Any]] = {}
        for key, one in self.spec.sets.items():
            score = results[one.kind][key][one.metric] if key in self.found else None
            row = {"name": one.name, "metric": one.metric, "score": score, "counts": score is not None and one.instead is None}
            rows[key] = row | {name: value for name in ("instead", "skipped") if (value := getattr(one, name)) is not None}
        averages = {}
        for name, keys in self.spec.groups.items():
            of = keys or list(rows)
            counted = [rows[key]["score"] for key in of if rows[key]["counts"]]
            averages[name] = {"score": sum(counted) / len(counted) if counted else None, "over": len(counted), "sets": len(of)}
        missing = [key for key, one in self.spec.sets.items() if key not in self.found and one.skipped is None]
        return {"title": self.spec.title, "sets": rows, "averages": averages, "missing": missing}


def shipped() -> list[str]:
    """Names of the suites inside the package."""
    files = resources.files("megakd.evaluation.suites").iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in files if entry.name.endswith(".toml"))


def chosen(choice: SuiteChoice | None, wanted: Of, world: World) -> tuple[Of, BenchmarkSuite | None]:
    """What is scored, with the sets of the chosen suite. A collective; raises ValueError as `open_suite`, on every rank."""
    if choice is None:
        return wanted, None
    suite = collectives.by_main(lambda: open_suite(choice.source, choice.data), world)
    return suite.added_to(wanted), suite


def open_suite(source: str, data: Path | None) -> BenchmarkSuite:
    """The suite `source`, a shipped name or a .toml file, with the sets of it that are in the folder `data`; which are not is logged.

    Raises ValueError for a suite that cannot be read, key by key, and where not one set is there.
    """
    spec = _read(source)
    if data is None:
        raise ValueError("--suite: give the folder of its sets as well, with --data")
    if not data.is_dir():
        raise ValueError(f"--data {data}: no such folder; it holds the suite's sets, as wds_{next(iter(spec.sets)).replace('/', '-')}_test")
    wanted = {key: one for key, one in spec.sets.items() if one.skipped is None}
    found = {key: place for key, one in wanted.items() if (place := _place(folder_of(str(data)), key, one)) is not None}
    if not found:
        tried = ", ".join(str(data / name) for name in _names(*next(iter(wanted.items()))))
        raise ValueError(f"--data {data}: none of the {len(wanted)} sets of {source} is there; the first was looked for as {tried}")
    for key, one in spec.sets.items():
        if one.skipped is not None:
            log.warning("suite %s: %s is not scored: %s", source, key, one.skipped)
        elif one.instead is not None and key in found:
            log.warning("suite %s: %s is scored by %s, not by its own %s, and is in no average", source, key, one.metric, one.instead)
    if missing := [key for key in wanted if key not in found]:
        log.warning("suite %s: %d of %d sets are not in %s: %s", source, len(missing), len(wanted), data, ", ".join(missing))
    return BenchmarkSuite(spec, found)


def _place(data: Path, key: str, one: SuiteSet) -> Path | None:
    return next((data / name for name in _names(key, one) if (data / name).is_dir()), None)


def _names(key: str, one: SuiteSet) -> list[str]:
    plain = key.replace("/", "-")
    return [one.folder] if one.folder is not None else [f"wds_{plain}_test", f"wds_{plain}"]


def _read(source: str) -> SuiteFile:
    if source in shipped():
        named, text = source, (resources.files("megakd.evaluation.suites") / f"{source}.toml").read_text(encoding="utf-8")
        settings = tomllib.loads(text)
    else:
        path = Path(source)
        if path.suffix != ".toml" or not texts.exists(path):
            raise ValueError(f"--suite {source}: no such file; give a .toml file, or one of the shipped: {', '.join(shipped())}")
        named = str(path)
        settings = texts.parse_toml(texts.read_text(path, f"suite {path}"), f"suite {path}")
    try:
        return SuiteFile.model_validate(settings)
    except ValidationError as error:
        raise ValueError(f"suite {named}:\n{load.explain(error, SuiteFile)}") from None
