"""Write a world: shards to train and to retrieve from, zero-shot sets, questions, a tokenizer, and how to make it again.

OUT/train/00000.tar ...         image-text pairs, `.txt` true of its image
OUT/train_noisy/00000.tar ...   as many other pairs, a fraction of whose `.txt` belongs to another image, as on the web
OUT/train_hard/00000.tar ...    groups of four pairs with full captions, each of which is false of the others' images
OUT/test/00000.tar ...          distinct scenes, full captions, always clean; hard negatives in `.json`
OUT/held_out/00000.tar ...      as many scenes of the seven pairs that training never saw, full captions
OUT/zeroshot/                   single things of the 35 trained pairs, CLIP_benchmark's webdataset layout, 42 classes
OUT/zeroshot_held_out/          the same classes, only things of the seven held-out pairs
OUT/questions/                  {train,test,held_out}_{questions,annotations}.json in VQAv2's format, train_text.json in LLaVA's
OUT/tokenizer/                  word-level, over the closed vocabulary
OUT/world.json                  settings and counts; written last: without it the world is unfinished
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megakd.data.shapes.captions import CAPTION_KINDS, CAPTION_WEIGHTS, NEGATIVE_KINDS
from megakd.data.shapes.questions import ANSWERS
from megakd.data.shapes.reading import MOST_SCENES, conversations
from megakd.data.shapes.scene import CELLS, COLOURS, HELD_OUT_PAIRS, PAIRS, SEEN_PAIRS, SHAPES, SIZES, distinct_attempts, sample_seed
from megakd.data.shapes.shards import MAX_SHARD_SIZE, ShardJob, ShardReport, compact, write_atomically, write_pairs, write_single_things
from megakd.data.shapes.vocabulary import CONTEXT_LENGTH, vocabulary, write_tokenizer
from megakd.runtime.files import PARTIAL

FORMAT_VERSION = 2  # 2: the split held_out and questions/train_text.json; all else is as in 1
# Twelve pixels a cell, so that a 12-pixel patch sees one. At 32 pixels, where 8-pixel patches cut through cells, the smoke teacher reached
# a zero-shot top-1 of .25 in 900 steps; at 36 .77 in 600.
IMAGE_SIZE = 36
MAX_SHARDS = 10**5  # five digits in a shard's name and in a sample's key
TEMPLATES = ("a {c}", "a small {c}", "a large {c}")
WORTH_A_POOL = 8000  # scenes of a third of a millisecond; a process takes a second to start
_ASKED = ("train", "test", "held_out")  # splits with questions
_FOLDERS = ("train", "train_noisy", "train_hard", "test", "held_out", "zeroshot", "zeroshot_held_out", "questions", "tokenizer")
_UNFINISHED = "world.unfinished.json"
_OLDER = (1,)


@dataclass(frozen=True, slots=True)
class WorldSettings:
    """What makes a world: equal settings are equal bytes, by the same Pillow and JPEG encoder."""

    train: int
    test: int
    seed: int
    caption_noise: float
    image_size: int
    shard_size: int
    zeroshot_per_class: int
    hard: int = 0

    def check(self) -> None:
        """Raise ValueError naming the setting and what it may be."""
        ranges = {"train": (1, 10**9), "test": (2, 10**9), "image_size": (16, 1024), "shard_size": (1, MAX_SHARD_SIZE)}
        for name, (low, high) in {**ranges, "zeroshot_per_class": (1, 10_000), "seed": (0, 2**63), "hard": (0, 10**9)}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} = {value!r}: give a whole number from {low} to {high}")
        for name in ("train", "test", "hard"):
            if getattr(self, name) > self.shard_size * MAX_SHARDS:
                raise ValueError(
                    f"{name} = {getattr(self, name)} takes more than {MAX_SHARDS} shards of shard_size = {self.shard_size}: raise it"
                )
        if not 0 <= self.caption_noise <= 1:
            raise ValueError(f"caption_noise = {self.caption_noise!r}: give the fraction of the training captions to shuffle, 0 to 1")
        if self.noisy == 1:
            raise ValueError(
                f"caption_noise = {self.caption_noise} of train = {self.train} is one caption, and it takes two to exchange them"
            )

    @property
    def noisy(self) -> int:
        """Captions of train_noisy that are exchanged."""
        return round(self.caption_noise * self.train)

    @property
    def splits(self) -> dict[str, int]:
        """Splits of image-text pairs -> their sizes."""
        noisy, hard = {"train_noisy": self.train} if self.noisy else {}, {"train_hard": self.hard} if self.hard else {}
        return {"train": self.train, **noisy, **hard, "test": self.test, "held_out": self.test}


@dataclass(frozen=True, slots=True)
class ShapesWorld:
    """What is in the folder: numbers of samples, and the seconds it took (0, and written False, when it was there)."""

    out: Path
    train: int
    train_noisy: int
    train_hard: int
    test: int
    zeroshot: int
    zeroshot_held_out: int
    train_questions: int
    test_questions: int
    held_out_questions: int
    text_conversations: int
    noisy_captions: int
    vocabulary_size: int
    max_caption_tokens: int  # with the start and the end, negatives included
    seconds: float
    written: bool


def write_world(
    out: Path,
    *,
    train: int,
    test: int,
    seed: int = 0,
    caption_noise: float = 0.0,
    image_size: int = IMAGE_SIZE,
    shard_size: int = 1000,
    zeroshot_per_class: int = 30,
    hard: int = 0,
    processes: int | None = None,
) -> ShapesWorld:
    """Write the world into the folder `out`, or find it there.

    train, test: image-text pairs. caption_noise: fraction of the captions that are shuffled in train_noisy, as large as train; 0 leaves
    that split out. image_size: pixels a side. shard_size: samples a tar. zeroshot_per_class: images of each pair in the two zero-shot sets.
    hard: pairs of train_hard; 0 leaves that split out. A reader that keeps its groups together (data.block = 4, data.window = 1) makes
    batches with hard negatives: images and captions that differ by one word.
    processes: default, one a core for a large world; any number writes the same bytes.
    Raises ValueError for a setting out of range and for a folder that holds anything else.
    """
    settings = WorldSettings(train, test, seed, float(caption_noise), image_size, shard_size, zeroshot_per_class, hard)
    settings.check()
    if processes is not None and processes < 1:
        raise ValueError(f"processes = {processes}: give at least 1, or None for one a core")
    out = Path(out)
    counts = _counts_there(out, settings)
    if counts is not None:
        return ShapesWorld(out, **counts, seconds=0.0, written=False)
    start, began = time.perf_counter(), time.time()
    out.mkdir(parents=True, exist_ok=True)
    marker, claim = out / _UNFINISHED, (json.dumps(asdict(settings)) + "\n").encode()
    # of an interrupted write; one of the same settings, which may go on in another process, is written over with the same bytes
    if marker.exists() and marker.read_bytes() != claim:
        for name in _FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
    write_atomically(marker, claim)
    counts = _write(out, settings, processes)
    record = {**_description(settings), "counts": counts}
    write_atomically(out / "world.json", (json.dumps(record, indent=2) + "\n").encode())
    marker.unlink(missing_ok=True)
    for partial in out.rglob(f".*{PARTIAL}"):
        if partial.stat().st_mtime < began:  # of a writer that was killed; a living one's lasts milliseconds
            partial.unlink(missing_ok=True)
    return ShapesWorld(out, **counts, seconds=time.perf_counter() - start, written=True)


def _counts_there(out: Path, settings: WorldSettings) -> dict[str, int] | None:
    """The counts of the finished world of these settings, None where there is none yet."""
    if not (out / "world.json").exists():
        strangers = [path.name for path in out.iterdir()] if out.is_dir() else []
        if strangers and _UNFINISHED not in strangers:
            raise ValueError(f"{out} holds other files ({', '.join(sorted(strangers)[:3])}) and no world: give an empty or a new folder")
        return None
    try:
        record = json.loads((out / "world.json").read_text(encoding="utf-8"))
        version, earlier, counts = record["format_version"], dict(record["settings"]), dict(record["counts"])
        # Of a world that was written before there was train_hard.
        earlier, counts = {"hard": 0, **earlier}, {"train_hard": 0, **counts}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out / 'world.json'} is damaged ({error!r}): remove the folder and write the world again") from error
    if version in _OLDER and earlier == asdict(settings):
        (out / "world.json").unlink()  # an older megakd's world is written over with the same bytes, and completed
        return None
    wanted, there = {"format_version": FORMAT_VERSION, **asdict(settings)}, {"format_version": version, **earlier}
    differing = [f"{name} = {there.get(name)!r} there, {value!r} asked" for name, value in wanted.items() if there.get(name) != value]
    if differing:
        raise ValueError(f"{out} holds another world ({'; '.join(differing)}): give another folder, or remove this one first")
    if missing := [path for path in _files(out, settings) if not path.exists()]:
        raise ValueError(f"{out} has a world.json, but {missing[0]} is gone: remove the folder and write the world again")
    return counts


def _shards(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _files(out: Path, settings: WorldSettings) -> list[Path]:
    """What a training or an evaluation reads of a finished world."""
    paths = [out / name / file for name in ("zeroshot", "zeroshot_held_out") for file in ("classnames.txt", "test/0.tar")]
    paths += [out / "questions" / f"{split}_{kind}.json" for split in _ASKED for kind in ("questions", "annotations")]
    paths += [out / "questions" / "train_text.json", out / "tokenizer" / "tokenizer.json", out / "tokenizer" / "tokenizer_config.json"]
    for split, count in settings.splits.items():
        paths += [out / split / f"{shard:05d}.tar" for shard in range(len(_shards(count, settings.shard_size)))]
    return paths


def exchanged_captions(settings: WorldSettings) -> dict[int, int]:
    """Noisy index of train_noisy -> the index whose caption it gets: one ring, so that none keeps its own.

    The noisy samples of a smaller fraction are among those of a larger one.
    """
    order = list(range(settings.train))
    random.Random(sample_seed(settings.seed, "train_noisy", 0, "noise")).shuffle(order)
    ring = order[: settings.noisy]
    return {index: ring[position - 1] for position, index in enumerate(ring)}


def _jobs(out: Path, settings: WorldSettings, split: str) -> list[ShardJob]:
    noise = exchanged_captions(settings) if split == "train_noisy" else {}
    redrawn = {i: n for i, n in enumerate(distinct_attempts(settings.seed, "test", settings.test)) if n} if split == "test" else {}
    return [
        ShardJob(
            *(settings.seed, split, shard, indices, settings.image_size, out / split / f"{shard:05d}.tar"),
            attempts={i: redrawn[i] for i in indices if i in redrawn},
            caption_from={i: noise[i] for i in indices if i in noise},
        )
        for shard, indices in enumerate(_shards(settings.splits[split], settings.shard_size))
    ]


def _write(out: Path, settings: WorldSettings, processes: int | None) -> dict[str, int]:
    write_tokenizer(out / "tokenizer")
    jobs = [job for split in settings.splits for job in _jobs(out, settings, split)]
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if sum(settings.splits.values()) >= WORTH_A_POOL else 1
    reports = _map(write_pairs, jobs, min(processes, len(jobs)))
    questions = {}
    for split in _ASKED:
        of_split = [report for job, report in zip(jobs, reports, strict=True) if job.split == split]
        questions[f"{split}_questions"] = _write_questions(out, split, of_split)
    texts = list(conversations(settings.seed, min(settings.train, MOST_SCENES)))
    write_atomically(out / "questions" / "train_text.json", ("[\n" + ",\n".join(texts) + "\n]\n").encode())
    return {
        "train": settings.train,
        "train_noisy": settings.splits.get("train_noisy", 0),
        "train_hard": settings.hard,
        "test": settings.test,
        "zeroshot": _write_zeroshot(out, settings, "zeroshot", SEEN_PAIRS),
        "zeroshot_held_out": _write_zeroshot(out, settings, "zeroshot_held_out", HELD_OUT_PAIRS),
        **questions,
        "text_conversations": len(texts),
        "noisy_captions": settings.noisy,
        "vocabulary_size": len(vocabulary()),
        "max_caption_tokens": 2 + max(report.longest for report in reports),
    }


def _map(work: Callable[[ShardJob], ShardReport], jobs: Sequence[ShardJob], processes: int) -> list[ShardReport]:
    if processes == 1:
        return list(map(work, jobs))
    # spawn: with torch loaded there are threads, and a forked child may inherit a lock that one of them holds
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(work, jobs))


def _write_questions(out: Path, split: str, reports: Sequence[ShardReport]) -> int:
    """Write the split's two files in VQAv2's format. Returns the number of questions."""
    questions = [entry for report in reports for entry in report.questions]
    annotations = [entry for report in reports for entry in report.annotations]
    head = {"info": {"description": "megakd shapes world", "version": str(FORMAT_VERSION)}, "data_type": "shapes", "data_subtype": split}
    for name, entries, more in (("questions", questions, {"task_type": "Open-Ended"}), ("annotations", annotations, {})):
        text = f'{compact({**head, **more})[:-1]},"{name}":[\n' + ",\n".join(entries) + "\n]}\n"
        write_atomically(out / "questions" / f"{split}_{name}.json", text.encode())
    return len(questions)


def _write_zeroshot(out: Path, settings: WorldSettings, name: str, pairs: tuple[tuple[str, str], ...]) -> int:
    """Write a zero-shot set in the layout of CLIP_benchmark's `wds/` datasets. Returns the number of images."""
    folder = out / name
    write_atomically(folder / "classnames.txt", "".join(f"{colour} {shape}\n" for shape, colour in PAIRS).encode())
    write_atomically(folder / "zeroshot_classification_templates.txt", "".join(f"{template}\n" for template in TEMPLATES).encode())
    write_atomically(folder / "dataset_type.txt", b"classification\n")
    write_atomically(folder / "test" / "nshards.txt", b"1\n")
    images = range(settings.zeroshot_per_class * len(pairs))
    return write_single_things(ShardJob(settings.seed, name, 0, images, settings.image_size, folder / "test" / "0.tar"), pairs)


def _description(settings: WorldSettings) -> dict[str, Any]:
    """What world.json says besides the counts."""
    call = ", ".join(f"{name}={value!r}" for name, value in asdict(settings).items())
    return {
        "format_version": FORMAT_VERSION,
        "settings": asdict(settings),
        "write_again": f"megakd.data.shapes.write_world(OUT, {call})",
        "shapes": SHAPES,
        "colours": COLOURS,
        "sizes": SIZES,
        "positions": CELLS,
        "held_out_pairs": [f"{colour} {shape}" for shape, colour in HELD_OUT_PAIRS],
        "caption_kinds": dict(zip(CAPTION_KINDS, CAPTION_WEIGHTS, strict=True)),
        "negative_kinds": NEGATIVE_KINDS,
        "answers": ANSWERS,
        "context_length": CONTEXT_LENGTH,
        "vocabulary": vocabulary(),
    }
