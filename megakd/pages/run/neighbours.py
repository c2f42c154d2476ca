"""Nearest neighbours of a run's student: captions of an image, images of a caption, on its first retrieval set.

Legend: N pairs, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from megakd.data.bad_samples import BadSample
from megakd.data.caption_tokens import caption
from megakd.data.transforms import rgb_image
from megakd.evaluation.encoder import Encoder, load_model
from megakd.evaluation.run import student_of
from megakd.evaluation.sets import open_retrieval
from megakd.pages.page import BAD, GOOD, Card, Cards, Line, Picture
from megakd.pages.run.pictures import short, small_jpeg, spread
from megakd.pages.run.reading import RunFiles
from megakd.recipe import Recipe
from megakd.recipe.best import EMA
from megakd.recipe.evaluation import CaptionFiles
from megakd.recipe.load import check_given
from megakd.runtime import checkpoint
from megakd.runtime.launch import World
from megakd.runtime.run_folder import MODEL, RUN

PAIRS = 500  # that are embedded
NEAREST = 3
EVENLY, FAILED = 6, 4
_ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class _Pairs:
    """Images with their first captions, and unit embeddings of both, (N, D)."""

    images: Sequence[Image.Image]
    captions: Sequence[str]
    image_ND: Tensor
    text_ND: Tensor

    def is_right(self, one: int, other: int) -> bool:
        """Whether the caption of the one is the other's too."""
        return one == other or self.captions[one] == self.captions[other]


def examples(run: RunFiles) -> tuple[list[Cards], list[str]]:
    """(images with captions and captions with images, what could not be shown and why)."""
    recipe = run.recipe
    if isinstance(recipe, str) or not recipe.evaluation.retrieval:
        return [], []
    name, given = next(iter(recipe.evaluation.retrieval.items()))
    try:
        check_given(recipe.evaluation, str(run.folder / RUN), "evaluation.")
        encoder, of = _student(run, recipe)
    except (ValueError, OSError) as error:
        return [], [f"Neighbours in {name} are not shown: {short(str(error))}"]
    try:
        pairs, total = _embedded(encoder, recipe, given, f"evaluation.retrieval.{name}")
    except (ValueError, OSError) as error:
        return [], [f"Neighbours in {name} are not shown: {short(str(error))} Paths are seen from the folder where this page was made."]
    return _cards(pairs), [f"{len(pairs.captions)} of the {total} pairs of {name}, evenly spaced, embedded by the student of {of}."]


def _student(run: RunFiles, recipe: Recipe) -> tuple[Encoder, str]:
    """The student of the newest checkpoint, else the one that the run has written, on the CPU. Raises ValueError where there is neither."""
    path = checkpoint.latest_valid(run.folder, lambda _: None)
    if path is not None:
        step, encoder = student_of(recipe, path, _ALONE, averaged=recipe.evaluation.weights == EMA)
        return encoder, f"step {step}"
    if (run.folder / MODEL).is_dir():
        return load_model(run.folder, _ALONE.device), f"{MODEL}/"
    raise ValueError(f"{run.folder} has no checkpoint and no {MODEL}/ yet.")


def _embedded(encoder: Encoder, recipe: Recipe, given: str | CaptionFiles, key: str) -> tuple[_Pairs, int]:
    """Those of evenly spaced pairs that can be read, and the number of all. Raises ValueError with the key where there are too few."""
    samples = open_retrieval(given, key, recipe.data, _ALONE)
    images, captions = [], []
    for sample in samples.read_each(spread(range(len(samples)), PAIRS), ("image", "caption")):
        try:
            if isinstance(sample, BadSample):
                raise sample
            image = rgb_image(sample.members["image"], recipe.data)
            lines = caption(sample.members["caption"]).splitlines()
        except BadSample:
            continue
        images.append(image)
        captions.append(lines[0] if lines else "")
    if len(images) <= NEAREST:
        raise ValueError(f"{key}: {len(images)} of its {len(samples)} pairs can be read.")
    with torch.inference_mode():
        return _Pairs(images, captions, encoder.encode_images(images), encoder.encode_texts(captions)), len(samples)


def _cards(pairs: _Pairs) -> list[Cards]:
    found = []
    for kind, what, queries, candidates, make in (
        ("image", "Images and their nearest captions", pairs.image_ND, pairs.text_ND, _of_image),
        ("caption", "Captions and their nearest images", pairs.text_ND, pairs.image_ND, _of_caption),
    ):
        nearest, cosines = _nearest(queries, candidates)
        hits = [pairs.is_right(query, nearest[query][0]) for query in range(len(nearest))]
        even = spread(range(len(nearest)), EVENLY)
        missed = spread([query for query, hit in enumerate(hits) if not hit and query not in even], FAILED)
        right = f"of all of them the first is right for {100 * sum(hits) / len(hits):.1f} %"
        for which, chosen, caption_text in (
            ("even", even, f"Evenly spaced; {right}. A sentence that several pairs share is right for each."),
            ("missed", missed, "More whose first neighbour is wrong."),
        ):
            title = what if which == "even" else f"{what}: failures"
            cards = tuple(
                make(pairs, query, nearest[query], cosines[query], f"{kind}_{which}_{place}") for place, query in enumerate(chosen)
            )
            if cards:
                found.append(Cards(f"{kind}s_{which}", title, caption_text, cards))
    return found


def _nearest(query_ND: Tensor, candidate_ND: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Of each query its nearest candidates and their cosines."""
    cosines, places = (query_ND @ candidate_ND.T).topk(NEAREST, dim=1)
    return places.tolist(), cosines.tolist()


def _of_image(pairs: _Pairs, query: int, nearest: list[int], cosines: list[float], key: str) -> Card:
    own = pairs.captions[query]
    lines = [
        Line(f"{place}. {_shown(cosine)}", short(pairs.captions[found]), GOOD if pairs.is_right(query, found) else BAD)
        for place, (found, cosine) in enumerate(zip(nearest, cosines, strict=True), 1)
    ]
    if not any(pairs.is_right(query, found) for found in nearest):
        lines.append(Line("its own", short(own)))
    return Card(Picture(key, small_jpeg(pairs.images[query]), f"picture of: {short(own)}"), tuple(lines))


def _of_caption(pairs: _Pairs, query: int, nearest: list[int], cosines: list[float], key: str) -> Card:
    def picture(place: int, found: int, note: str, mark: str) -> Picture:
        return Picture(f"{key}_{place}", small_jpeg(pairs.images[found]), f"picture of: {short(pairs.captions[found])}", note, mark)

    pictures = [
        picture(place, found, _shown(cosine), GOOD if pairs.is_right(query, found) else BAD)
        for place, (found, cosine) in enumerate(zip(nearest, cosines, strict=True), 1)
    ]
    if not any(pairs.is_right(query, found) for found in nearest):
        pictures.append(picture(0, query, "its own", ""))
    return Card(None, (Line("caption", short(pairs.captions[query])),), tuple(pictures))


def _shown(cosine: float) -> str:
    """With a true minus sign."""
    return f"{cosine:.2f}".replace("-", "−")
