"""What `megakd evaluate` prints: the models with their sizes and speeds, a row for each score, and a suite's averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.table import Table

from megakd.evaluation import report
from megakd.evaluation.hard_negatives import MEAN
from megakd.runtime.console import plain

_MOST_KINDS = 12  # of hard negatives that a table shows


class Row(NamedTuple):
    """A score as text. set: of the first row of a set, with its size; remark: what the reader should know of it."""

    set: str
    metric: str
    score: str
    remark: str = ""


def show(results: Mapping[str, Any]) -> None:
    """Print the tables."""
    console = plain()
    console.print(report.heading(results))
    if results.get("models"):
        console.print(_models(results["models"]))
    table = Table("set", "metric", box=None)
    table.add_column("score", justify="right")
    table.add_column("")
    for row in rows(results):
        table.add_row(*row)
    if table.row_count:
        console.print(table)
    for name, found in results.get("diagnostics", {}).items():
        console.print("\n".join(report.diagnostics(name, found)))
    if "suite" in results:
        console.print(f"{results['suite']['title']}:")
        console.print(_suite(results["suite"]))


def _models(models: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("", "model", box=None)
    for heading in ("parameters", "MB", "images/s"):
        table.add_column(heading, justify="right")
    for role, one in models.items():
        size = "" if one["bytes"] is None else f"{one['bytes'] / 1e6:,.2f}"
        speed = one["images_per_second"]
        unknown = f"not measured: {one['not_measured']}" if "not_measured" in one else "not measured"
        shown = unknown if speed is None else f"{speed:,.1f}"
        table.add_row(role, str(one["model"]), "" if one["parameters"] is None else f"{one['parameters']:,}", size, shown)
    return table


def rows(results: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each score of zero-shot, retrieval, hard negatives, readers, probes and questions."""
    for name, scores in results.get("zero_shot", {}).items():
        title = f"zero-shot {name} ({scores['images']} images)"
        yield Row(title, "top-1", f"{scores['top1']:.2%}", _lost(scores))
        yield Row("", "top-5", f"{scores['top5']:.2%}", scores.get("classes", ""))
        yield Row("", "mean per class recall", f"{scores['mean_per_class_recall']:.2%}")
    for name, scores in results.get("retrieval", {}).items():
        title, remark = f"retrieval {name} ({scores['pairs']} captions of {scores['images']} images)", _lost(scores)
        for way in ("image_to_text", "text_to_image"):
            for cutoff, value in scores[way].items():
                yield Row(title, f"{way.replace('_', ' ')} {cutoff}", f"{value:.2%}", remark)
                title = remark = ""
    for name, by_kind in results.get("hard_negatives", {}).items():
        kinds = list(by_kind.items())
        few = kinds if len(kinds) <= _MOST_KINDS or MEAN not in by_kind else [(MEAN, by_kind[MEAN])]
        for number, (kind, scores) in enumerate(few):
            hidden = f"{len(kinds) - 1} kinds, each in the JSON" if len(few) < len(kinds) else ""
            remark = ", ".join(filter(None, (f"{scores['pairs']} pairs", hidden, _lost(scores))))
            yield Row("" if number else f"hard negatives {name}", kind, f"{scores['accuracy']:.2%}", remark)
    for name, scores in results.get("reader", {}).items():
        title = f"question reader {name} ({scores['questions']} questions)"
        yield Row(title, scores["metric"], f"{scores['accuracy']:.2%}", f"most frequent answers {scores['majority']:.2%}")
        if "blind" in scores:
            yield Row("", "without images", f"{scores['blind']:.2%}")
    for name, scores in results.get("probe", {}).items():
        title = f"probe {name} ({scores['images']} images)"
        for what, of in report.PROBED.items():
            yield Row(title, f"linear, {what}", f"{scores[f'{of}linear']['top1']:.2%}", _lost(scores))
            yield Row("", f"{scores['neighbours']} nearest, {what}", f"{scores[f'{of}knn']['top1']:.2%}")
            title = ""
    for name, scores in results.get("vqa", {}).items():
        shown = "not scored" if scores["accuracy"] is None else f"{scores['accuracy']:.2%}"
        lost = f"{scores['unusable']} could not be asked" if scores["unusable"] else ""
        yield Row(f"vqa {name} ({scores['questions']} questions)", scores["metric"], shown, lost)
        families = scores.get("by_family", {})
        for family, part in families.items() if len(families) > 1 else ():
            yield Row("", family, f"{part['accuracy']:.2%}")


def _suite(suite: Mapping[str, Any]) -> Table:
    table = Table("set or average", "metric", box=None)
    table.add_column("score", justify="right")
    table.add_column("")
    for key, one in suite["sets"].items():
        remark = "no set of this key there" if key in suite["missing"] else one.get("skipped", "")
        if one.get("instead"):
            remark = f"in no average: the suite's own metric is {one['instead']}" + (f"; {remark}" if remark else "")
        table.add_row(one["name"], one["metric"], "" if one["score"] is None else f"{one['score']:.2%}", remark)
    for name, one in suite["averages"].items():
        shown = "" if one["score"] is None else f"{one['score']:.2%}"
        table.add_row(name, "average", shown, f"over {one['over']} of {one['sets']} sets")
    return table


def _lost(scores: Mapping[str, Any]) -> str:
    return f"{scores['unreadable']} could not be read and count as wrong" if scores["unreadable"] else ""
