"""Evaluation results as a few lines of text, and as numbers for a monitor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megakd.vqa import evaluate

PROBED = {"pooled": "", "mean patch": "patch_"}  # features, and how their scores' names begin


def numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Every score by its path, as "retrieval/NAME/image_to_text/R@1", for a monitor: fractions and counts of unreadable samples."""
    kinds = ("zero_shot", "retrieval", "hard_negatives", "diagnostics", "reader", "probe", "vqa")
    found = {path: value for kind in kinds for path, value in _leaves(kind, results.get(kind, {}))}
    averaged = numbers(results["ema"]) if "ema" in results else {}
    return found | {f"ema/{path}": value for path, value in averaged.items()}


def _leaves(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{path}/{name}", inner)
    elif isinstance(value, float) or (type(value) is int and path.endswith("/unreadable")):
        yield path, float(value)


def heading(results: Mapping[str, Any]) -> str:
    """Of what the scores are: a run's step, a model without a run, a bundle."""
    if "step" in results:
        of = " of the averaged weights (ema)" if results.get("weights") == "ema" else ""
        return f"evaluation at step {results['step']}{of}:"
    precision = f" in {results['precision']}" if "precision" in results else ""
    return f"evaluation of {results.get('model') or results['bundle']}{precision}:"


def lines(results: dict[str, Any]) -> str:
    """A line for each set, in percent."""
    rows = [heading(results)]
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
    for name, found in results.get("diagnostics", {}).items():
        rows += diagnostics(name, found)
    for name, scores in results.get("reader", {}).items():
        blind = f", without images {scores['blind']:.1%}" if "blind" in scores else ""
        beside = f"most frequent answers {scores['majority']:.1%}{blind}"
        lost = f", {scores['unusable']} could not be asked" if scores["unusable"] else ""
        rows.append(
            f"  question reader {name} (closed vocabulary of {scores['answers']} answers, no decoder): {scores['accuracy']:.1%} of "
            f"{scores['questions']} questions ({scores['metric']}; {beside}){lost}"
        )
        if len(families := scores.get("by_family", {})) > 1:
            rows.append("    " + ", ".join(f"{family} {part['accuracy']:.1%}" for family, part in families.items()))
    for name, scores in results.get("probe", {}).items():
        near = f"{scores['neighbours']} nearest"
        both = [
            f"{what} linear {scores[f'{of}linear']['top1']:.1%}, {near} {scores[f'{of}knn']['top1']:.1%}" for what, of in PROBED.items()
        ]
        rows.append(f"  probe {name} of {scores['images']} images: {'; '.join(both)}{_lost(scores)}")
    if "vqa" in results:
        rows.append(evaluate.lines(results["vqa"]))
    if "ema" in results:
        rows.append(lines({**results["ema"], "step": results["step"], "weights": "ema"}))
    return "\n".join(rows)


def diagnostics(name: str, found: Mapping[str, Any]) -> list[str]:
    """The main numbers of student and teacher on one set; a line for each teacher."""
    teachers = {role: numbers for role, numbers in found.items() if isinstance(numbers, Mapping)} or {"teacher": found}
    rows = []
    for role, of in teachers.items():
        parts = [
            ("linear CKA", [(side, f"cka_{side}", "{:.3f}") for side in ("image", "text", "patch")]),
            ("mutual neighbours", [(side, f"knn_{side}", "{:.1%}") for side in ("image", "text")]),
            ("rows", [("KL", "rows_kl", "{:.3g} nats"), ("top-1", "rows_top1", "{:.1%}"), ("rank", "rows_spearman", "{:.3f}")]),
            ("row entropy", [("student", "student_row_entropy", "{:.3g}"), ("teacher", "teacher_row_entropy", "{:.3g} nats")]),
        ]
        shown = [
            f"{title} " + ", ".join(f"{label} {form.format(of[key])}" for label, key, form in keys if key in of)
            for title, keys in parts
            if any(key in of for _, key, _ in keys)
        ]
        beside = f" beside {role}" if len(teachers) > 1 else ""
        rows.append(f"  diagnostics {name} ({found['pairs']} pairs){beside}: {'; '.join(shown)}")
    return rows


def _lost(scores: Mapping[str, Any]) -> str:
    return f" ({scores['unreadable']} could not be read and count as wrong)" if scores["unreadable"] else ""
