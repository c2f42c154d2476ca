"""The model card of an export: a README.md whose YAML head the hub reads, made of run.json and the scores of the run, and of nothing else.

What is not known is not written: no licence that the user has not named, no score of another checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megakd.export.source import Source
from megakd.models.clip import parameters_in
from megakd.recipe.credentials import redacted
from megakd.runtime import run_folder

CARD = "README.md"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
TAGS = ("clip", "knowledge-distillation", "megakd")


def check_licence(licence: str | None) -> None:
    """Raises ValueError for what is no identifier of a licence as the hub has them."""
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise ValueError(
            f"--license {licence!r}: an identifier as the hub has them, in small letters: apache-2.0, mit, cc-by-nc-4.0, other"
        )


def text(
    title: str, source: Source, library: str, pipeline: str, licence: str | None, use: str, checked: Sequence[str]
) -> tuple[str, list[str]]:
    """The card, and lines for people on what it leaves out. use: Python that loads the model. checked: what the export has compared."""
    run, missing = _run(source), []
    if licence is None:
        missing.append("the model card names no licence: give --license, or write it into the card before others use the model")
    head = ["---", f"library_name: {library}", f"pipeline_tag: {pipeline}"]
    head += [f"license: {licence}"] if licence else []
    head += ["tags:", *(f"- {tag}" for tag in TAGS), "---"]
    parts = ["\n".join(head), f"# {title}", _what(source, run), f"## Use\n```python\n{use.strip()}\n```"]
    if source.run is not None:
        scores = list(_scores(source))
        if scores:
            table = ["| set | score | value | of |", "|---|---|---:|---:|", *(f"| {' | '.join(row)} |" for row in scores)]
            parts.append("## Scores\nAs `megakd evaluate` gives them for this checkpoint; fractions of 1.\n\n" + "\n".join(table))
        else:
            missing.append(f"the model card has no scores: {source.run / run_folder.EVALUATION} has none of step {source.step}")
        parts.append("## Training\n" + "\n".join(f"- {line}" for line in _training(source, run)))
    parts.append("## Checked at export\n" + "\n".join(f"- {line}" for line in checked))
    return "\n\n".join(parts) + "\n", missing


def _run(source: Source) -> dict[str, Any]:
    """run.json, without credentials; empty without a run."""
    if source.run is None:
        return {}
    content: dict[str, Any] = redacted(json.loads((source.run / run_folder.RUN).read_text(encoding="utf-8")))
    return content


def _what(source: Source, run: Mapping[str, Any]) -> str:
    version = (run.get("versions") or {}).get("megakd")
    by = f", trained with megakd {version}" if version else ""
    towers = "an image and a text tower" if source.built.description.has_text else "an image tower"
    millions = parameters_in(source.built.clip) / 1e6
    assumed = "".join(f" Note: {line}." for line in source.assumed)
    if source.bundle is not None:
        return f"A language model that answers about images, with a vision tower of {millions:.1f} million parameters{by}.{assumed}"
    return f"A model with {towers}, {millions:.1f} million parameters, embeddings of width {source.built.description.width}{by}.{assumed}"


def _training(source: Source, run: Mapping[str, Any]) -> Iterator[str]:
    recipe = run.get("recipe") or {}
    optim, data = recipe.get("optim") or {}, recipe.get("data") or {}
    yield f"recipe: {recipe.get('name') or 'without a name'}, step {source.step} of {optim.get('steps')}, {optim.get('batch')} pairs a step"
    active = {name: weight for name, weight in (recipe.get("objectives") or {}).items() if weight}
    yield f"objectives: {', '.join(f'{name} {_short(weight)}' for name, weight in active.items()) or 'none'}"
    teachers = {"teacher": recipe.get("teacher"), **(recipe.get("ensemble") or {})}
    for role, teacher in teachers.items():
        if teacher:
            name = teacher.get("model") or "an architecture of the recipe's own"
            yield f"{role}: {name}, {teacher.get('pretrained') or 'its own weights'}"
    if not recipe.get("teacher"):
        yield "teacher: none"
    yield f"started from: {_started_from(run, recipe.get('student') or {})}"
    shards = data.get("train")
    yield f"data: {', '.join(shards) if isinstance(shards, list) else shards}"
    versions = {name: version for name, version in (run.get("versions") or {}).items() if version}
    yield f"versions: {', '.join(f'{name} {version}' for name, version in versions.items())}"
    yield f"commit: {run.get('commit') or 'not known'}; ranks: {run.get('ranks')}; device: {run.get('device')}"


def _started_from(run: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    begun = run.get(run_folder.START)
    if not isinstance(begun, dict):  # of an earlier version's run
        return str(student.get("pretrained") or student.get("model") or "random weights")
    parts = {name: part["tensors"] for name, part in begun.items() if name != "notes"}
    return "; ".join(f"{name}: {', '.join(of) or 'random weights'}" for name, of in parts.items() if name != run_folder.REST)


def _short(weight: Any) -> str:
    return f"{weight:g}" if isinstance(weight, int | float) else json.dumps(weight)


def _scores(source: Source) -> Iterator[tuple[str, str, str, str]]:
    """(set, score, value, of how many) of the exported step."""
    assert source.run is not None
    try:
        found = json.loads((source.run / run_folder.EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(found, dict) or found.get("step") != source.step:
        return
    for name, scores in found.get("zero_shot", {}).items():
        for key in ("top1", "top5"):
            yield f"zero-shot {name}", key, f"{scores[key]:.4f}", f"{scores['images']} images"
    for name, scores in found.get("retrieval", {}).items():
        for way in ("image_to_text", "text_to_image"):
            for cutoff, value in scores[way].items():
                yield f"retrieval {name}", f"{way.replace('_', ' ')} {cutoff}", f"{value:.4f}", f"{scores['images']} images"
    for name, kinds in found.get("hard_negatives", {}).items():
        for kind, scores in kinds.items():
            yield (
                f"hard negatives {name}",
                f"{kind.replace('_', ' ')} (chance 0.5)",
                f"{scores['accuracy']:.4f}",
                f"{scores['pairs']} pairs",
            )
