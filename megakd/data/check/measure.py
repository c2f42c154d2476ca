"""The facts of each sample, read in worker processes as training reads it: the same shards, the same rules of what is dropped.

A sample's facts are a row of ROW, 53 bytes, so that millions fit into memory: of an image and of a caption a digest of 16 bytes is kept,
by which equal ones are found, and neither itself.
"""

from __future__ import annotations

import copy
import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data.bad_samples import BadCounter, BadSample, Reason, located, usable
from megakd.data.caption_tokens import PlainCaptions, Tokenize, plain_captions
from megakd.data.captions import CaptionPolicy, Captions
from megakd.data.shards import Sample, ShardSet
from megakd.data.stream import WorkerStream
from megakd.data.transforms import FORMATS, as_rgb, content_digest, decode
from megakd.runtime.console import LongWork

ROW = np.dtype(
    [
        ("image", "<u8", (2,)),  # digests: of the pixels in RGB, and of the text without white space around it
        ("caption", "<u8", (2,)),
        ("width", "<u4"),  # upright
        ("height", "<u4"),
        ("bytes", "<u4"),  # of the image's file
        ("characters", "<u4"),
        ("tokens", "<u2"),  # before they are cut, LONGEST at most
        ("format", "u1"),  # in FORMATS
        ("signals", "u1"),  # a bit for each of SIGNALS
        ("usable", "?"),
    ]
)
Rows = NDArray[np.void]
LONGEST = 1024  # tokens that are counted
_AT_ONCE = 64  # samples
_KEPT = 8  # unusable samples of each reason, with all that is known of them
_FILE = re.compile(r"[^/\n]{1,200}\.(?:jpe?g|png|gif|webp|bmp|tiff?|avif|svg)", re.IGNORECASE)
_URL = re.compile(r"https?://|\bwww\.\w", re.IGNORECASE)
_MARKUP = re.compile(r"</?[a-z][^<>]{0,300}>|&(?:[a-z]{2,8}|#\d{1,7}|#x[0-9a-f]{1,6});", re.IGNORECASE)
# What is a fact about a caption and mostly means that nobody wrote it as one.
SIGNALS = {
    "the name of a file": lambda text: _FILE.fullmatch(text) is not None,
    "with an address (http://, www.)": lambda text: _URL.search(text) is not None,
    "without a letter": lambda text: not any(map(str.isalpha, text)),
    "a single word": lambda text: len(text.split(maxsplit=1)) == 1,
    "with HTML (tags, entities)": lambda text: _MARKUP.search(text) is not None,
    "with control or broken characters": lambda text: _has_controls(text),
}


def _has_controls(text: str) -> bool:
    """Control characters but tabs and line breaks, invisible marks of direction, and what stands for a letter that was lost."""
    if "\ufffd" in text:
        return True
    return not text.isprintable() and any(unicodedata.category(sign) in ("Cc", "Cf") and sign not in "\t\r\n\u200d" for sign in text)


class TokenCounter:
    """Tokens of texts, the start's and end's among them. length: those that a model reads, to which its tokenizer cuts."""

    def __init__(self, tokenize: Tokenize) -> None:
        inner: Any = tokenize.wrapped if isinstance(tokenize, PlainCaptions) else tokenize
        self.length = int(inner(["a"]).shape[1])
        longer = copy.copy(inner)
        longer.context_length = max(LONGEST, self.length)  # both of open_clip's tokenizers read it
        self._tokenize = plain_captions(longer)
        words = getattr(inner, "tokenizer", inner)
        fill = getattr(words, "pad_token_id", None)
        self._fill = 0 if fill is None else int(fill)
        # where a text's end token also fills what is left of its row, the first one is the end's
        self._ends_in_fill = fill is not None and fill == getattr(words, "eos_token_id", None)

    def __call__(self, texts: list[str]) -> NDArray[np.int64]:
        """(n,): of n texts."""
        if not texts:
            return np.zeros(0, np.int64)
        used = self._tokenize(texts).ne(self._fill).flip(1).cummax(1).values.sum(1)  # all before the filling
        counts: NDArray[np.int64] = np.minimum(used.numpy() + self._ends_in_fill, LONGEST)
        return counts


@dataclass(frozen=True)
class Measured:
    """rows: (n,) of ROW, of n samples; the unusable ones' are empty. unusable: (index, why) of some of each reason.

    sources: (S, 2) int64, for each source of captions the usable samples that have some there, and how many these are.
    """

    rows: Rows
    bad: BadCounter
    unusable: list[tuple[int, BadSample]]
    sources: NDArray[np.int64]


@dataclass(frozen=True)
class _Measurer:
    """The dataset in a worker."""

    shards: ShardSet
    counter: TokenCounter | None
    captions: bool

    def __getitems__(self, indices: NDArray[np.int64]) -> Measured:
        policy = self.shards.captions
        needs = ("image", *policy.needs) if self.captions else ("image",)
        rows, texts, sources = np.zeros(len(indices), ROW), list[str](), np.zeros((len(policy.sources), 2), np.int64)

        def to_row(place: int, sample: Sample) -> None:
            with located(sample.where):
                # in the order of training's own, `pairs.decoded`: the first of a sample's faults is the one that counts
                captions = policy.read(sample.members) if self.captions else Captions(("",), ())
                text = captions.texts[chosen(policy, captions, int(indices[place]))].strip()
                image = decode(sample.members["image"], self.shards.data.max_pixels)
                stored_as = FORMATS.index({"MPO": "JPEG"}.get(image.format or "", image.format or ""))  # MPO: several JPEGs in one
                image = as_rgb(image, self.shards.data)
            row = rows[place]
            row["width"], row["height"], row["bytes"] = *image.size, len(sample.members["image"])
            row["format"], row["image"] = stored_as, np.frombuffer(content_digest(image), "<u8")
            row["characters"] = len(text)
            row["caption"] = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8")
            row["signals"] = sum(is_so(text) << bit for bit, is_so in enumerate(SIGNALS.values())) if self.captions else 0
            row["usable"] = True
            texts.append(text)
            numbers, counts = np.unique(np.array(captions.source, np.int64), return_counts=True)
            sources[numbers] += np.stack([np.ones_like(counts), counts], axis=1)

        made = usable(range(len(indices)), self.shards.read_each(indices.tolist(), needs), to_row)
        if self.counter is not None:
            rows["tokens"][made.index_of_row] = self.counter(texts)
        kept: dict[Reason, list[tuple[int, BadSample]]] = {}
        for place, bad in made.unusable:
            kept.setdefault(bad.reason, []).append((int(indices[place]), bad))
        return Measured(rows, made.bad, [one for of_reason in kept.values() for one in of_reason[:_KEPT]], sources)


def chosen(policy: CaptionPolicy, captions: Captions, index: int) -> int:
    """The number of the one caption by which a check knows sample `index`, where it has several: drawn once, as training draws."""
    return policy.draw(captions, 0, (index, 0))


def measure(shards: ShardSet, indices: NDArray[np.int64], counter: TokenCounter | None, captions: bool) -> Measured:
    """Of the samples `indices`, in order, by data.workers processes. Shows how far it is."""
    parts = [indices[start : start + _AT_ONCE] for start in range(0, len(indices), _AT_ONCE)]
    workers = min(shards.data.workers, len(parts))
    stream: WorkerStream[Measured] = WorkerStream(_Measurer(shards, counter, captions), parts, workers, pin_memory=False)
    rows, bad, unusable, done = np.zeros(len(indices), ROW), BadCounter(), list[tuple[int, BadSample]](), 0
    sources = np.zeros((len(shards.captions.sources), 2), np.int64)
    kept: dict[Reason, int] = {}
    try:
        with LongWork("reading", len(indices), "samples") as work:
            for part in stream:
                rows[done : done + len(part.rows)] = part.rows
                done += len(part.rows)
                bad.merge(part.bad)
                sources += part.sources
                for index, why in part.unusable:
                    if kept.get(why.reason, 0) < _KEPT:
                        kept[why.reason] = kept.get(why.reason, 0) + 1
                        unusable.append((index, why))
                work.advance(len(part.rows))
    finally:
        stream.close()
    return Measured(rows, bad, unusable, sources)
