"""Damaged members of samples that hold embeddings: the rows that were written, or an unusable sample that says why."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from faults import damage
from faults.campaign import Mutant, SilentFault
from megakd.data.bad_samples import REASONS, BadSample
from megakd.data.captions import CaptionPolicy
from megakd.data.reinforced.shards import Held, ReinforcedShards
from megakd.recipe import Data
from support.reinforced import FORMS, numbered, plain_pairs, sample_members

NAME, COUNT, LIMIT = "reinforced", 3000, 20.0
SIZE = 16
POLICY = CaptionPolicy.of(Data.model_validate({"captions": {"txt": 0.5, "syn.json:syn_text": 0.5}}))
READER = ReinforcedShards(POLICY, {"teacher": 4, "ensemble.b": 3}, SIZE, replays=True)


@dataclass(frozen=True)
class Original:
    """A sound sample. members: by extension; rows: what is read of it."""

    form: str
    members: dict[str, bytes]
    rows: Tensor


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    originals = []
    for form in FORMS:
        members = sample_members(*plain_pairs(1)[0], numbered, SIZE, form=form)
        originals.append(Original(form, members, _rows(_held(members))))
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(count):
        original = draw.choice(originals)
        name = draw.choice([kind for kind in original.members if kind in ("npz", "pth.gz", "paug.json", "syn.json")])
        path = folder / name
        path.write_bytes(original.members[name])
        how = damage.bytes_of(path, draw)
        yield Mutant(f"{original.form}, {how}", functools.partial(_attempt, original, name, path.read_bytes()))


def _attempt(original: Original, name: str, content: bytes) -> str:
    try:
        held = _held({**original.members, name: content})
        rows = _rows(held)
        for view in held.views:
            view.pixels(Image.new("RGB", (60, 50)), (SIZE, SIZE, Image.Resampling.BICUBIC), SIZE)
    except BadSample as bad:
        if bad.reason not in REASONS or not bad.detail:
            raise SilentFault(f"{bad.reason}: {bad.detail}") from bad
        return "told"
    # what an augmentation or a caption was, nothing tells but `megakd embed --check`; rows are known by the checksums of zip and gzip
    if name in ("npz", "pth.gz") and not torch.equal(rows, original.rows):
        raise SilentFault("other rows than were written")
    return "sound"


def _held(members: dict[str, bytes]) -> Held:
    found = {POLICY.slots.get(name, name): content for name, content in members.items()}
    return READER.held(found, POLICY.read(found))


def _rows(held: Held) -> Tensor:
    return READER.unit(torch.cat([held.image, torch.stack(held.text)]))
