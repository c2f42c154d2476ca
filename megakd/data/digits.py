"""A second small world, whose pictures are not ours: handwritten digits of scikit-learn (1,797 of 8 x 8 pixels, from UCI's optdigits).

One to three digits lie on a 3 x 3 grid of 12-pixel cells. Captions and VQAv2-format questions are made from their labels; the handwriting
of one digit in five is in no training picture. The folder has the shapes world's layout, so that the same recipes read it:

train/ train_noisy/ test/     tars of .jpg, .txt and .json; half of the noisy captions belong to another picture; test/ has unseen writing
zeroshot/ zeroshot_held_out/  single digits in CLIP_benchmark's layout, in writing of the training pictures and in unseen writing
questions/                    {train,test}_{questions,annotations}.json
tokenizer/                    word-level, over the captions' words
world.json                    settings and counts; written last
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megakd.data import own_tokenizer
from megakd.data.shapes.scene import CELLS
from megakd.data.shapes.shards import Members, compact, sample_key, write_atomically, write_tar
from megakd.runtime.extras import library

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNTS = ("0", "1", "2", "3")
SHARD, CELL, SIDE = 1000, 12, 36  # samples a tar; pixels of a cell and of a picture
UNSEEN_EVERY = 5  # every so manieth of the written digits is in no training picture
TOKENS = 32  # context length of the shipped recipes' text towers
TEMPLATES = ("a {c}", "a handwritten {c}")


class Placed(NamedTuple):
    """digit: its value; writing: which of the written digits; cell: index into CELLS."""

    digit: int
    writing: int
    cell: int


@dataclass(frozen=True)
class DigitsWorld:
    """train: clean pairs, and as many noisy ones. written: False where an equal world was there."""

    folder: Path
    train: int
    test: int
    questions: int
    written: bool


def write_digits(out: Path, *, train: int, test: int, seed: int = 0, caption_noise: float = 0.5) -> DigitsWorld:
    """Write the world into `out`, or find it there. Equal arguments are equal bytes, by the same scikit-learn, Pillow and JPEG encoder.

    Raises ValueError without scikit-learn, for a size out of range, and for a folder that holds anything else.
    """
    for name, value in (("train", train), ("test", test)):
        if not 2 <= value <= 10**6:
            raise ValueError(f"{name} = {value}: give a whole number from 2 to 1000000")
    if not 0 <= caption_noise <= 1:
        raise ValueError(f"caption_noise = {caption_noise}: give the fraction of the noisy captions to shuffle, 0 to 1")
    settings = {"kind": "digits", "train": train, "test": test, "seed": seed, "caption_noise": caption_noise}
    record = out / "world.json"
    if record.is_file():
        there = json.loads(record.read_text(encoding="utf-8"))
        if there.get("settings") != settings:
            raise ValueError(f"{out}: holds another world ({there.get('settings')}); choose another folder, or delete it")
        return DigitsWorld(out, **there["counts"], written=False)
    if out.is_dir() and any(out.iterdir()) and not (out / "unfinished").is_file():
        raise ValueError(f"{out}: is there already and no world; choose another folder")
    write_atomically(out / "unfinished", b"")
    writer = _Writer(_images(), seed)
    asked = writer.pairs(out, "train", train, 0.0)
    writer.pairs(out, "train_noisy", train, caption_noise)
    asked += writer.pairs(out, "test", test, 0.0)
    for name in ("zeroshot", "zeroshot_held_out"):
        writer.single(out / name, name, 30)
    words = out / "words.txt"
    write_atomically(words, "".join(f"{text}\n" for text in writer.vocabulary()).encode())
    for file in (out / "tokenizer").glob("*"):  # of an interrupted write
        file.unlink()
    own_tokenizer.write([str(words)], out / "tokenizer", "words", 128, TOKENS)
    counts = {"train": train, "test": test, "questions": asked}
    write_atomically(record, (json.dumps({"settings": settings, "counts": counts}, indent=2) + "\n").encode())
    (out / "unfinished").unlink()
    return DigitsWorld(out, **counts, written=True)


def _images() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(1797, 8, 8) grey values of 0 to 16, and (1797,) labels."""
    found = library("sklearn.datasets", "handwritten digits need", "study", "scikit-learn").load_digits()
    return found.images, found.target


@dataclass(frozen=True)
class _Writer:
    images: tuple[NDArray[np.float64], NDArray[np.int64]]
    seed: int

    def _stream(self, split: str, index: int, purpose: str) -> random.Random:
        return random.Random(f"{self.seed}/{split}/{index}/{purpose}")

    def _writings(self, *, unseen: bool) -> list[int]:
        return [index for index in range(len(self.images[1])) if (index % UNSEEN_EVERY == 0) == unseen]

    def scene(self, split: str, index: int) -> list[Placed]:
        """One to three digits in distinct cells."""
        rng, writings = self._stream(split, index, "scene"), self._writings(unseen=split == "test")
        cells = rng.sample(range(len(CELLS)), rng.choices((1, 2, 3), (20, 40, 40))[0])
        chosen = [rng.choice(writings) for _ in cells]
        return [Placed(int(self.images[1][writing]), writing, cell) for writing, cell in zip(chosen, cells, strict=True)]

    def picture(self, scene: list[Placed]) -> bytes:
        """JPEG: each digit enlarged to its cell, white on black."""
        canvas = Image.new("L", (SIDE, SIDE))
        for placed in scene:
            grey = (self.images[0][placed.writing] * 255 / 16).astype(np.uint8)
            canvas.paste(Image.fromarray(grey).resize((CELL, CELL), Image.Resampling.BILINEAR), _corner(placed.cell))
        buffer = io.BytesIO()
        canvas.convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue()

    def pairs(self, out: Path, split: str, count: int, noise: float) -> int:
        """Write a split; returns the number of its questions, which the noisy one has none of."""
        source = self._exchanged(split, count, noise)
        questions: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for shard in range(-(-count // SHARD)):
            samples: list[tuple[str, Members]] = []
            for number, index in enumerate(range(shard * SHARD, min(count, (shard + 1) * SHARD))):
                scene, key = self.scene(split, index), sample_key(shard, number)
                text = caption(self.scene(split, source.get(index, index)))
                truth = {"key": key, "caption": text, "scene": [placed._asdict() for placed in scene], "negatives": negatives(scene)}
                samples.append((key, {"jpg": self.picture(scene), "txt": text.encode(), "json": compact(truth).encode()}))
                for place, (family, asked, answer) in enumerate(ask(scene, self._stream(split, index, "questions"))):
                    ids = {"image_id": int(key), "question_id": int(key) * 10 + place}
                    questions.append({**ids, "question": asked})
                    annotations.append({**ids, **_annotation(family, answer)})
            write_tar(out / split / f"{shard:05d}.tar", samples)
        if split == "train_noisy":
            return 0
        for name, entries in (("questions", questions), ("annotations", annotations)):
            write_atomically(out / "questions" / f"{split}_{name}.json", compact({name: entries}).encode())
        return len(questions)

    def _exchanged(self, split: str, count: int, noise: float) -> dict[int, int]:
        """Whose caption a sample gets, for the share of them that get another's."""
        rng = self._stream(split, 0, "noise")
        moved = rng.sample(range(count), round(noise * count))
        return dict(zip(moved, [*moved[1:], *moved[:1]], strict=True)) if len(moved) > 1 else {}

    def single(self, folder: Path, name: str, each: int) -> None:
        """Write a zero-shot set of one digit a picture."""
        write_atomically(folder / "classnames.txt", "".join(f"{word}\n" for word in WORDS).encode())
        write_atomically(folder / "zeroshot_classification_templates.txt", "".join(f"{template}\n" for template in TEMPLATES).encode())
        write_atomically(folder / "dataset_type.txt", b"classification\n")
        writings = self._writings(unseen=name == "zeroshot_held_out")

        def samples() -> Iterator[tuple[str, Members]]:
            for number in range(each * len(WORDS)):
                rng, digit = self._stream(name, number, "scene"), number % len(WORDS)
                writing = rng.choice([one for one in writings if self.images[1][one] == digit])
                picture = self.picture([Placed(digit, writing, rng.randrange(len(CELLS)))])
                yield f"{number:09d}", {"jpg": picture, "cls": str(digit).encode()}

        write_tar(folder / "test" / "0.tar", samples())

    def vocabulary(self) -> list[str]:
        """Texts with every word of captions, questions, answers and templates."""
        scene = [Placed(digit, 0, cell) for digit in range(10) for cell in range(len(CELLS))]
        drawn = [ask(self.scene("train", index), random.Random(index)) for index in range(200)]
        asked = [f"{question} {answer}" for questions in drawn for _, question, answer in questions]
        return [caption(scene), *asked, *TEMPLATES, *WORDS, *COUNTS, "yes no"]


def caption(scene: list[Placed]) -> str:
    """ "a seven at the top left, a two at the center", in reading order."""
    return ", ".join(f"a {WORDS[placed.digit]} at the {CELLS[placed.cell]}" for placed in sorted(scene, key=lambda placed: placed.cell))


def negatives(scene: list[Placed]) -> dict[str, str]:
    """False captions that differ in one word: of the first digit another value, or another cell."""
    first, *others = sorted(scene, key=lambda placed: placed.cell)
    free = next(cell for cell in range(len(CELLS)) if cell not in [placed.cell for placed in scene])
    return {
        "digit": caption([first._replace(digit=(first.digit + 3) % 10), *others]),
        "position": caption([first._replace(cell=free), *others]),
    }


def ask(scene: list[Placed], rng: random.Random) -> list[tuple[str, str, str]]:
    """Three questions (family, text, answer), each of another family."""
    placed, values = rng.choice(scene), {one.digit for one in scene}
    absent = rng.choice([digit for digit in range(10) if digit not in values])
    there = rng.random() < 0.5
    questions = [
        ("digit", f"which digit is at the {CELLS[placed.cell]}?", WORDS[placed.digit]),
        ("count", "how many digits are there?", str(len(scene))),
        ("existence", f"is there a {WORDS[placed.digit if there else absent]}?", "yes" if there else "no"),
    ]
    if len(values) > 1:
        questions.append(("largest", "which digit is the largest?", WORDS[max(values)]))
    if sum(one.digit == placed.digit for one in scene) == 1:
        questions.append(("position", f"where is the {WORDS[placed.digit]}?", CELLS[placed.cell]))
    return rng.sample(questions, 3)


def _annotation(family: str, answer: str) -> dict[str, Any]:
    kind = {"count": "number", "existence": "yes/no"}.get(family, "other")
    answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": person + 1} for person in range(10)]
    return {"question_type": family, "answer_type": kind, "multiple_choice_answer": answer, "answers": answers}


def _corner(cell: int) -> tuple[int, int]:
    """Of a cell: x, y."""
    row, column = divmod(cell, 3)
    return column * CELL, row * CELL
