"""Evaluation results as text for people."""

from __future__ import annotations

from typing import Any

from megakd.evaluation import vqa


def lines(results: dict[str, Any]) -> str:
    """A few lines: one for each set, percentages."""
    rows = [f"evaluation at step {results['step']}:"]
    for name, found in results.get("zero_shot", {}).items():
        rows.append(f"  zero-shot {name}: top-1 {found['top1']:.1%}, top-5 {found['top5']:.1%} of {found['images']} images")
    for name, found in results.get("retrieval", {}).items():
        both = "; ".join(
            f"{label} " + " ".join(f"{cutoff} {value:.1%}" for cutoff, value in found[key].items())
            for label, key in (("image to text", "image_to_text"), ("text to image", "text_to_image"))
        )
        rows.append(f"  retrieval {name} ({found['pairs']} pairs): {both}")
    for name, found in results.get("hard_negatives", {}).items():
        kinds = ", ".join(f"{kind} {facts['accuracy']:.1%} of {facts['pairs']}" for kind, facts in found.items())
        rows.append(f"  hard negatives {name} (chance 50%): {kinds}")
    if "vqa" in results:
        rows.append(vqa.lines(results["vqa"]))
    return "\n".join(rows)
