"""Text that a tiny decoder learns to read from before it sees an image: LLaVA's conversations without any.

Each scene, none of another split's, is a conversation: its full caption, in the image's place, and questions answered from it. For some
scenes there is also the caption alone, as the answer to nothing: a projector is aligned to a decoder that can say captions. With one for
every scene 74 % of the learned tokens would be captions' words, most of them chance; so it is 41 %.
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
    """The file's entries as JSON, in the order of the scenes; `families`, of the turns, is megakd's own field."""
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
    """The "full" one of `captions`, without the time that the other kinds take."""
    return Caption("full", Claim(tuple(Mention(*thing) for thing in rng.sample(scene, len(scene))), complete=True))


def _questions(scene: Scene, rng: random.Random) -> list[ShapesQuestion]:
    """As in the splits with images, and about a relation wherever there is one: it is the hardest to learn, so it is asked most."""
    chosen = questions(scene, rng)
    if all(question.family != "relation" for question in chosen) and (more := ask_relation(scene, rng)) is not None:
        chosen.append(more)
    rng.shuffle(chosen)  # the first stands for an image's only question, which is of any family
    return chosen
