"""Evaluation results as a few lines of text, and as numbers for a monitor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megakd.vqa import evaluate


def numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Every score by its path, as "retrieval/NAME/image_to_text/R@1", for a monitor: fractions and counts of unreadable samples."""
    kinds = ("zero_shot", "retrieval", "hard_negatives", "vqa")
    return {path: value for kind in kinds for path, value in _leaves(kind, results.get(kind, {}))}


def _leaves(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{path}/{name}", inner)
    elif isinstance(value, float) or (type(value) is int and path.endswith("/unreadable")):
        yield path, float(value)


def lines(results: dict[str, Any]) -> str:
    """A line for each set, in percent."""
    rows = [f"evaluation at step {results['step']}:"]
    for name, scores in results.get("zero_shot", {}).items():
        top1, top5, images = scores["top1"], scores["top5"], scores["images"]
        rows.append(f"  zero-shot {name}: top-1 {top1:.1%}, top-5 {top5:.1%} of {images} images{_lost(scores)}")
    for name, scores in results.get("retrieval", {}).items():
        recalls = "; ".join(
            f"{key.replace('_', ' ')} " + " ".join(f"{cutoff} {value:.1%}" for cutoff, value in scores[key].items())
            for key in ("image_to_text", "text_to_image")
        )
        sizes = f"{scores['pairs']} captions of {scores['images']} images"
        repeated = f", {scores['repeated_captions']} captions repeat another" if scores["repeated_captions"] else ""
        rows.append(f"  retrieval {name} ({sizes}): {recalls}{repeated}{_lost(scores)}")
    for name, by_kind in results.get("hard_negatives", {}).items():
        kinds = ", ".join(f"{kind} {scores['accuracy']:.1%} of {scores['pairs']}{_lost(scores)}" for kind, scores in by_kind.items())
        rows.append(f"  hard negatives {name} (chance 50%): {kinds}")
    if "vqa" in results:
        rows.append(evaluate.lines(results["vqa"]))
    return "\n".join(rows)


def _lost(scores: Mapping[str, Any]) -> str:
    return f" ({scores['unreadable']} could not be read and count as wrong)" if scores["unreadable"] else ""
