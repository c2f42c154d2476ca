"""The numbers of a check as tables, which the terminal and the page show alike."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megakd.data.check.cards import shown_text
from megakd.data.check.measure import LONGEST
from megakd.data.check.summary import QUANTILES, Histogram, Summary, caption_at
from megakd.data.shards import ShardSet

ADVICE = {
    "missing_image": "no image under a known extension",
    "missing_caption": "no member or field that data.caption or data.captions names",
    "empty_caption": "nothing visible in it",
    "corrupt_image": "it does not decode",
    "too_large": "more than data.max_pixels",
    "too_thin": "one side is more than 200 times the other",
    "bad_pixels": "pixels that cannot become RGB",
    "bad_text": "no UTF-8, or no caption by its length",
    "truncated_tar": "lost in a damaged tar",
    "unused_members": "its members are there and none can be used",
    "read_error": "the bytes cannot be read",
    "missing_embedding": "no member that holds its embeddings or augmentations (teacher.store = 'data.train')",
    "bad_embedding": "embeddings or augmentations that are damaged, or of another image, or of other teachers",
    "bad_json": "a member of captions that is no JSON, or whose field holds no text",
}


@dataclass(frozen=True)
class NumberTable:
    """key: short, for links. The first column is text, the others are numbers but those named in `texts`."""

    key: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: tuple[str, ...] = ()


def share(count: float, of: float) -> str:
    return f"{count / of:.2%}" if of else "0.00%"


def all_tables(summary: Summary, shards: ShardSet) -> list[NumberTable]:
    """Those with a row, in order."""
    tables = [
        _dropped(summary),
        _quantiles(summary),
        _formats(summary),
        _sources(summary),
        _signals(summary, shards),
        _repeats(summary),
        _commonest(summary, shards),
    ]
    return [table for table in tables if table.rows]


def _dropped(summary: Summary) -> NumberTable:
    rows = []
    for reason in sorted({**summary.known.counts, **summary.bad.counts}):
        of_index, of_read = summary.known.counts.get(reason, 0), summary.bad.counts.get(reason, 0)
        example = summary.bad.examples.get(reason) or summary.known.examples.get(reason, "")
        by_reading = f"{of_read:,} ({share(of_read, summary.bad.seen)})"
        by_index = f"{of_index:,} ({share(of_index, summary.known.seen)})"
        rows.append((f"{reason}: {ADVICE.get(reason, '')}", by_index, by_reading, shown_text(example)))
    caption = (
        f"By the indexes: of all {summary.known.seen:,} samples, {summary.lost:,} of which are in no row. By reading: of the "
        f"{summary.bad.seen:,} that were read, as training reads them; what the indexes know of those is counted there again."
    )
    columns = ("reason", "by the indexes", "by reading", "example")
    return NumberTable("dropped", "What would be dropped", caption, columns, tuple(rows), ("example",))


def _quantiles(summary: Summary) -> NumberTable:
    rows = tuple(
        (name, *(f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in of.values())) for name, of in summary.quantiles.items()
    )
    caption = "Of the samples that were read and can be used, images upright."
    if summary.context is not None:
        caption += (
            f" Tokens are those of the whole caption with its start and end, counted up to {LONGEST}; the model reads {summary.context}, "
            f"and {summary.cut:,} captions ({share(summary.cut, len(summary.usable_N))}) are cut."
        )
    return NumberTable("sizes", "Sizes", caption, ("", *QUANTILES), rows)


def _formats(summary: Summary) -> NumberTable:
    count = len(summary.usable_N)
    rows = tuple((name, f"{number:,}", share(number, count)) for name, number in sorted(summary.formats.items(), key=lambda one: -one[1]))
    return NumberTable("formats", "Formats", "By the images' bytes, not by the extension.", ("format", "images", "share"), rows)


def _sources(summary: Summary) -> NumberTable:
    usable = len(summary.usable_N)
    rows = tuple(
        (name, f"{drawn:.1%}", f"{has:,}", share(has, usable), f"{count:,}") for name, (drawn, has, count) in summary.sources.items()
    )
    caption = (
        "Of samples that can be used. One caption of each is drawn, by these shares of the sources that it has, of a list any alike; the "
        "other tables know a sample by one such draw."
    )
    return NumberTable("sources", "Captions by source", caption, ("source", "drawn", "samples", "share", "captions"), rows)


def _signals(summary: Summary, shards: ShardSet) -> NumberTable:
    rows = []
    for name, (count, index) in summary.signals.items():
        if count and index is not None:
            rows.append((name, f"{count:,}", share(count, len(summary.usable_N)), shards.where(index)))
    caption = "What is a fact about a caption and mostly means that nobody wrote it as one. Such samples are trained on."
    return NumberTable(
        "signals", "Odd captions", caption, ("the caption is, or is", "captions", "share", "example"), tuple(rows), ("example",)
    )


def _repeats(summary: Summary) -> NumberTable:
    rows = []
    for name, found in summary.repeats.items():
        largest = f"{found.groups[0].count:,}" if found.groups else "1"
        rows.append((name, f"{found.distinct:,}", f"{found.repeated:,}", share(found.repeated, len(summary.usable_N)), largest))
    caption = (
        "Exact repeats: of images by their pixels in RGB, of captions by their text, of pairs by both; each is known by a digest of 16 "
        "bytes. Repeated: samples whose like came before. Such samples are trained on."
    )
    if not summary.is_whole:
        caption += " Of a part of the samples: in the whole set there are more."
    columns = ("", "distinct", "repeated", "share", "most alike")
    return NumberTable("repeats", "What is there twice", caption, columns, tuple(rows))


def _commonest(summary: Summary, shards: ShardSet) -> NumberTable:
    rows = []
    for name, found in summary.repeats.items():
        for one in found.groups if name != "pairs" else ():
            text = shown_text(caption_at(shards, one.members[0])) if name == "captions" else ""
            example = shards.where(one.members[0])
            rows.append((f"{name[:-1]}: {text}" if text else name[:-1], f"{one.count:,}", share(one.count, len(summary.usable_N)), example))
    columns = ("", "times", "share", "the first")
    return NumberTable(
        "commonest", "The commonest", "The images and captions that are there most often.", columns, tuple(rows), ("the first",)
    )


def bars(histogram: Histogram) -> list[tuple[str, int]]:
    """(what a bar counts, how many)."""
    edges = [f"{edge:.3g}" if edge < 100 else f"{edge:,.0f}" for edge in histogram.edges]
    names = [f"below {edges[0]}", *(f"{low} to {high}" for low, high in pairwise(edges)), f"{edges[-1]} and more"]
    return list(zip(names, histogram.counts, strict=True))
