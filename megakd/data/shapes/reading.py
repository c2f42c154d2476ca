"""Text for a tiny decoder to learn to read from, before it sees an image: LLaVA's conversations without any.

For each scene, no other split's: a full caption of it, which stands where the image will, and questions that are answered from it,
in one conversation, since reading a caption costs more than a question. For some scenes also the caption alone, said to nothing: a
decoder that can say captions is what a projector is aligned to. Not for all: with one a scene, 74 %
of the learned tokens would be words of captions, most of them chance; so it is 41 %.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from megakd.data.shapes.captions import Caption, Claim, Mention
from megakd.data.shapes.questions import ShapesQuestion, ask_relation, questions
from megakd.data.shapes.scene import Scene, scene_of, stream
from megakd.data.shapes.shards import compact

SPLIT = "text"
MOST_SCENES = 20_000  # 70,000 questions, which a decoder of half a million weights does not outgrow in the minutes it is given
CAPTION_EVERY = 4  # scenes


def conversations(seed: int, scenes: int) -> Iterator[str]:
    """The entries of the file, as JSON, in the order of the scenes; `families`, of the turns, is megakd's own field."""
    number = 0
    for index in range(scenes):
        scene = scene_of(seed, SPLIT, index)
        caption = _full(scene, stream(seed, SPLIT, index, "words")).text
        scene_questions = _questions(scene, stream(seed, SPLIT, index, "questions"))
        entries = [[("caption", "", caption)]] if index % CAPTION_EVERY == 0 else []
        entries.append([(q.family, q.text if turn else f"{caption} . {q.text}", q.answer) for turn, q in enumerate(scene_questions)])
        for turns in entries:
            messages = [{"from": who, "value": value} for _, *texts in turns for who, value in zip(("human", "gpt"), texts, strict=True)]
            entry: dict[str, Any] = {"id": number, "families": [family for family, *_ in turns], "conversations": messages}
            yield compact(entry)
            number += 1


def _full(scene: Scene, rng: random.Random) -> Caption:
    """As `captions` says it, which also makes the other kinds and would take a fifth of the time."""
    return Caption("full", Claim(tuple(Mention(*thing) for thing in rng.sample(scene, len(scene))), complete=True))


def _questions(scene: Scene, rng: random.Random) -> list[ShapesQuestion]:
    """As in the splits with images, and about a relation wherever there is one to ask about.

    A relation is the hardest to learn, one bit an answer and none of it in the words of the question: it is asked most.
    """
    chosen = questions(scene, rng)
    if all(question.family != "relation" for question in chosen) and (more := ask_relation(scene, rng)) is not None:
        chosen.append(more)
    rng.shuffle(chosen)  # about an image there is one question, the first: that one is to be of any family
    return chosen
