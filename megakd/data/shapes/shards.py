"""Samples as img2dataset writes them: tars with `.jpg`, `.txt` and `.json` under one key, and `_stats.json` beside.

A shard is made by one process from numbers alone, so any number of processes writes the same bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megakd.data.shapes.captions import Caption, captions, negatives, training_kind
from megakd.data.shapes.pixels import draw_picture, jpeg
from megakd.data.shapes.questions import annotation, questions
from megakd.data.shapes.scene import PAIRS, Scene, draw_single, names_held_out, sample_seed, scene_graph, scene_of, stream
from megakd.runtime.files import atomic_file

Members = Mapping[str, bytes]  # extension -> content
KEY_DIGITS, INDEX_DIGITS = 9, 4  # img2dataset's keys: five digits of the shard, four of the sample in it
MAX_SHARD_SIZE = 10**INDEX_DIGITS
TRAINING = ("train", "train_noisy")  # splits whose captions are of every kind; of train_hard they are full


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One shard of image-text pairs; `indices` counts through the split."""

    seed: int
    split: str
    shard: int
    indices: range
    image_size: int
    path: Path
    attempts: Mapping[int, int] = field(default_factory=dict)  # index -> attempt at which its scene is distinct; default 0
    caption_from: Mapping[int, int] = field(default_factory=dict)  # noisy index -> index whose caption it gets


@dataclass(slots=True)
class ShardReport:
    """Words of the longest caption or negative, and the entries of the questions' and the annotations' file, as JSON."""

    longest: int = 0
    questions: list[str] = field(default_factory=list)
    annotations: list[str] = field(default_factory=list)


def sample_key(shard: int, index: int) -> str:
    """The key of a shard's index-th sample, such as "000010007"; as a number it is the questions' image_id."""
    return f"{shard * MAX_SHARD_SIZE + index:0{KEY_DIGITS}d}"


compact = json.JSONEncoder(separators=(",", ":")).encode


def write_atomically(path: Path, content: bytes) -> None:
    """Write so that a reader finds the whole file or none, also where two processes write one world."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def write_tar(path: Path, samples: Iterable[tuple[str, Members]]) -> int:
    """Write (key, members) as a tar without owners and times, so that equal samples are equal bytes; the number of samples."""
    buffer, count = io.BytesIO(), 0
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            count += 1
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    write_atomically(path, buffer.getvalue())
    return count


def write_pairs(job: ShardJob) -> ShardReport:
    """Write one shard with its `_stats.json`; returns what concerns the split as a whole."""
    report, samples = ShardReport(), []
    for number, index in enumerate(job.indices):
        key = sample_key(job.shard, number)
        scene = scene_of(job.seed, job.split, index, job.attempts.get(index, 0))
        members, words = _pair(job, key, index, scene)
        samples.append((key, members))
        report.longest = max(report.longest, words)
        _ask(job, int(key), index, scene, report)
    count = write_tar(job.path, samples)
    stats = {"count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0, "status_dict": {"success": count}}
    write_atomically(job.path.with_name(f"{job.path.stem}_stats.json"), (json.dumps(stats, indent=4) + "\n").encode())
    return report


def _pair(job: ShardJob, key: str, index: int, scene: Scene) -> tuple[Members, int]:
    """One sample's members, and the words in the longest text of it."""
    by_kind, caption = _captions(job, index, scene)
    false = negatives(caption, scene, stream(job.seed, job.split, index, "negatives"))
    source = job.caption_from.get(index)
    text = caption.text if source is None else _captions(job, source, scene_of(job.seed, job.split, source))[1].text
    truth: dict[str, Any] = {
        "key": key,
        "caption": text,
        "status": "success",
        "width": job.image_size,
        "height": job.image_size,
        "caption_is_noisy": source is not None,
        "true_caption": caption.text,
        "caption_kind": caption.kind,
        "captions": {kind: each.text for kind, each in by_kind.items()},
        "negatives": false,
        "scene": scene_graph(scene),
        "sample_seed": sample_seed(job.seed, job.split, index, attempt=job.attempts.get(index, 0)),
    }
    picture = _jpeg_of(job, index, scene)
    longest = max(len(each.split(" ")) for each in (*truth["captions"].values(), *false.values()))
    return {"jpg": picture, "txt": text.encode(), "json": compact(truth).encode()}, longest


def _captions(job: ShardJob, index: int, scene: Scene) -> tuple[dict[str, Caption], Caption]:
    """All captions of a scene, and the sample's own: of any kind in training, in full elsewhere."""
    words = stream(job.seed, job.split, index, "words")
    by_kind = captions(scene, words)
    return by_kind, by_kind[training_kind(by_kind, words) if job.split in TRAINING else "full"]


def _jpeg_of(job: ShardJob, index: int, scene: Scene) -> bytes:
    return jpeg(draw_picture(scene, stream(job.seed, job.split, index, "pixels"), job.image_size))


def _ask(job: ShardJob, image_id: int, index: int, scene: Scene, report: ShardReport) -> None:
    rng = stream(job.seed, job.split, index, "questions")
    unseen = list(dict.fromkeys(f"{thing.colour} {thing.shape}" for thing in scene if names_held_out(thing.shape, thing.colour)))
    more = {"held_out_pairs": unseen} if unseen else {}
    for number, question in enumerate(questions(scene, rng)):
        ids = {"image_id": image_id, "question_id": image_id * 10 + number}
        report.questions.append(compact({**ids, "question": question.text}))
        report.annotations.append(compact({**annotation(question, rng), **ids, **more}))


def write_single_things(job: ShardJob, pairs: tuple[tuple[str, str], ...]) -> int:
    """Write the one shard of a zero-shot set (`.jpg .cls .json`), the pairs in turn; returns the number of images."""

    def samples() -> Iterable[tuple[str, Members]]:
        for number, index in enumerate(job.indices):
            shape, colour = pairs[index % len(pairs)]
            scene = draw_single(stream(job.seed, job.split, index, "scene"), shape, colour)
            key, label = f"{number:0{KEY_DIGITS}d}", PAIRS.index((shape, colour))
            truth = {"key": key, "class": label, "scene": scene_graph(scene), "sample_seed": sample_seed(job.seed, job.split, index)}
            yield key, {"jpg": _jpeg_of(job, index, scene), "cls": str(label).encode(), "json": compact(truth).encode()}

    return write_tar(job.path, samples())
