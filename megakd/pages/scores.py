"""Which numbers of an evaluation are its scores, in the order in which pages show them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# The first that is there is the main one: a pattern of paths, a title, paths of its families.
KNOWN_SCORES = (
    (r"vqa/([^/]+)/accuracy", "VQA {}", "vqa/{}/by_family/*/accuracy"),
    (r"reader/([^/]+)/accuracy", "question reader {}", "reader/{}/by_family/*/accuracy"),
    (r"retrieval/([^/]+)/mean_R@1", "retrieval {}, mean R@1", None),
    (r"zero_shot/([^/]+)/top1", "zero-shot {}, top-1", None),
    (r"hard_negatives/([^/]+/[^/]+)/accuracy", "hard negatives {}", None),
    (r"probe/([^/]+/[^/]+)/top1", "probe {}, top-1", None),
)


class KnownScore(NamedTuple):
    """families: a pattern of the paths of its parts, with one `*`."""

    path: str
    title: str
    families: str | None


def known_scores(paths: Iterable[str]) -> list[KnownScore]:
    """Those of an evaluation's paths that are scores, the main one first."""
    there, found = dict.fromkeys(paths), []
    for pattern, title, families in KNOWN_SCORES:
        for path in there:
            if match := re.fullmatch(pattern, path):
                parts = families.format(match[1]) if families else None
                found.append(KnownScore(path, title.format(match[1].replace("/", ", ")), parts))
    return found
