"""Evaluation results as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megakd.vqa import evaluate


def numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Every score by its place, as "retrieval/NAME/image_to_text/R@1": what a monitor draws. Counts and shares, no settings."""
    kinds = ("zero_shot", "retrieval", "hard_negatives", "vqa")
    return {path: value for kind in kinds for path, value in _leaves(kind, results.get(kind, {}))}


def _leaves(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{path}/{name}", inner)
    elif isinstance(value, float) or (type(value) is int and path.endswith("/unreadable")):
        yield path, float(value)


def lines(results: dict[str, Any]) -> str:
    """A few lines: one for each set, percentages."""
    rows = [f"evaluation at step {results['step']}:"]
    for name, found in results.get("zero_shot", {}).items():
        rows.append(f"  zero-shot {name}: top-1 {found['top1']:.1%}, top-5 {found['top5']:.1%} of {found['images']} images{_lost(found)}")
    for name, found in results.get("retrieval", {}).items():
        both = "; ".join(
            f"{label} " + " ".join(f"{cutoff} {value:.1%}" for cutoff, value in found[key].items())
            for label, key in (("image to text", "image_to_text"), ("text to image", "text_to_image"))
        )
        sizes = f"{found['pairs']} captions of {found['images']} images"
        repeated = f", {found['repeated_captions']} captions repeat another" if found["repeated_captions"] else ""
        rows.append(f"  retrieval {name} ({sizes}): {both}{repeated}{_lost(found)}")
    for name, found in results.get("hard_negatives", {}).items():
        kinds = ", ".join(f"{kind} {facts['accuracy']:.1%} of {facts['pairs']}{_lost(facts)}" for kind, facts in found.items())
        rows.append(f"  hard negatives {name} (chance 50%): {kinds}")
    if "vqa" in results:
        rows.append(evaluate.lines(results["vqa"]))
    return "\n".join(rows)


def _lost(found: Mapping[str, Any]) -> str:
    return f" ({found['unreadable']} could not be read and count as wrong)" if found["unreadable"] else ""
