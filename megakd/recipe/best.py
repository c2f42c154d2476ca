"""Which numbers of an evaluation `checkpoint.best` may go by, and whether more of one is better.

A score is named by its path in evaluation.json: the kind of set, the set's name, the score; "/" or "." between them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megakd.recipe import texts
from megakd.recipe.evaluation import Evaluation

# Values of evaluation.weights. EMA is also the key of the scores of averaged weights, where both kinds are evaluated.
CURRENT, EMA, BOTH = "current", "ema", "both"
_RECALLS = tuple(f"{way}/R@{most}" for way in ("image_to_text", "text_to_image") for most in (1, 5, 10))
_HIGHER = {
    "zero_shot": ("top1", "top5", "mean_per_class_recall", "f1_macro"),
    "retrieval": ("mean_R@1", *_RECALLS),
    "hard_negatives": ("KIND/accuracy",),
    "vqa": ("accuracy",),
    "diagnostics": ("cka_image", "cka_text", "cka_patch", "knn_image", "knn_text", "rows_top1", "rows_spearman"),
}
_LOWER = {"diagnostics": ("rows_kl",)}
_AT_END = ("reader", "probe")


@dataclass(frozen=True)
class BestScore:
    """path: keys of an evaluation's results. higher: whether more of it is better. averaged: of the averaged weights."""

    path: tuple[str, ...]
    higher: bool
    averaged: bool

    @property
    def name(self) -> str:
        return "/".join(self.path)

    def of(self, results: Mapping[str, Any]) -> float:
        """Raises ValueError where an evaluation has no such number: its kinds of negatives are known then."""
        found: Any = results
        for key in self.path:
            inner = found.get(key) if isinstance(found, Mapping) else None
            if inner is None:
                there = ", ".join(map(str, found)) if isinstance(found, Mapping) else "nothing"
                raise ValueError(f"checkpoint.best = {self.name!r}: the evaluation gave no {key!r} there, but {there}; name one of them")
            found = inner
        return float(found)

    def is_better(self, value: float, than: float) -> bool:
        return value > than if self.higher else value < than


def read(name: str, evaluation: Evaluation, roles: Sequence[str]) -> BestScore:
    """name: `checkpoint.best`. roles: of the teachers that diagnostics compare with.

    Raises ValueError for a score that none of the evaluations gives.
    """
    named = f"checkpoint.best = {texts.shown(name)}"
    if not evaluation.every:
        raise ValueError(f"{named}: nothing is scored before the end of the run: set evaluation.every")
    kinds = list(_HIGHER)
    prefix, rest = ((EMA,), name[len(EMA) + 1 :]) if re.match(rf"{EMA}[./]", name) else ((), name)
    if prefix and evaluation.weights != BOTH:
        raise ValueError(
            f"{named}: scores of averaged weights stand beside the others with evaluation.weights = 'both' alone; take ema out"
        )
    kind = _first(rest, [*kinds, *_AT_END])
    if kind is None:
        raise ValueError(f"{named}: {texts.did_you_mean(re.split('[./]', rest)[0], kinds)}it begins with one of {', '.join(kinds)}")
    if kind in _AT_END:
        raise ValueError(f"{named}: a {kind} is trained and scored at the end of a run alone; name a score of {', '.join(kinds)}")
    sets: Mapping[str, Any] = getattr(evaluation, kind)
    rest = rest[len(kind) + 1 :]
    of_set = _first(rest, sets)
    if of_set is None:
        there = f"it has {', '.join(sets)}" if sets else "it has none"
        raise ValueError(f"{named}: evaluation.{kind} has no set of that name; {texts.did_you_mean(rest, sets)}{there}")
    score, path = rest[len(of_set) + 1 :], (*prefix, kind, of_set)
    averaged = bool(prefix) or evaluation.weights == EMA
    if kind == "diagnostics" and len(roles) > 1:
        if (role := _first(score, roles)) is None:
            raise ValueError(
                f"{named}: the set's numbers stand under each teacher's role; add one of {', '.join(roles)} before the last word"
            )
        score, path = score[len(role) + 1 :], (*path, role)
    score = score.replace(".", "/")
    if kind == "hard_negatives" and (found := re.fullmatch("(.+)/accuracy", score)):
        return BestScore((*path, found[1], "accuracy"), True, averaged)
    known = (*_HIGHER[kind], *_LOWER.get(kind, ()))
    if score not in known:
        raise ValueError(f"{named}: {texts.did_you_mean(score, known)}what is better or worse of {kind} is {', '.join(known)}")
    return BestScore((*path, *score.split("/")), score in _HIGHER[kind], averaged)


def _first(name: str, known: Collection[str]) -> str | None:
    """The longest known word that a name begins with, and that "/" or "." ends."""
    return max((word for word in known if name.startswith((f"{word}/", f"{word}."))), key=len, default=None)
