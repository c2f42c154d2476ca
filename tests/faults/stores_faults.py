"""Damaged stores of embeddings: what training reads from one is what was written, or the run says what it lacks."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from faults import damage
from faults.campaign import Mutant, SilentFault, mutants_of_copies
from megakd.data.store import writer
from megakd.data.store.manifest import PatchLayout
from megakd.data.store.reader import Layout, Manifest, Store, StoredRows, StoreType
from support import safetensors_files, stores

NAME, COUNT, LIMIT = "stores", 500, 20
SAMPLES, PART, VIEWS, WIDTH = 40, 16, 2, 8
KEY = {"seed": 3, "weights": {"name": "x", "sha256": "1"}, "views": {"flip": 0.5}, "data": {"samples": SAMPLES, "signature": 5}}
MADE = {"precision": "fp32", "int8": False}
SCALE, BIAS = 14.25, -10.0
PATCHES, ASKED = PatchLayout((1, 2), {3: 4, 11: 6}), {-1: 11, 3: 3}
CAPTIONS = np.arange(SAMPLES) % 3 + 1  # of each sample, where a store has several


@dataclass(frozen=True)
class Original:
    """A store, and what it holds. formerly: as versions wrote it that knew no checks of rows and of the manifest."""

    folder: Path
    formerly: bool
    asked: dict[int, int]  # blocks whose patch tokens are read
    rows: list[StoredRows]  # of every sample, by view


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    kinds: tuple[tuple[StoreType, bool, PatchLayout | None, int | None], ...] = (
        *(("bf16", False, None, None), ("fp32", False, None, None), ("bf16", True, None, None), ("fp32", True, None, None)),
        *(("bf16", False, PATCHES, None), ("fp32", False, PATCHES, None), ("bf16", False, None, 2), ("fp32", False, PATCHES, 2)),
    )
    originals = [_original(folder / f"original_{number}", *kind) for number, kind in enumerate(kinds)]
    return mutants_of_copies(count, draw, folder, originals, _damaged, _attempt)


def _original(folder: Path, dtype: StoreType, formerly: bool, patches: PatchLayout | None, captions: int | None) -> Original:
    torch.manual_seed(7)
    layout = Layout(SAMPLES, PART, VIEWS, WIDTH, dtype, patches, captions)
    (folder / "parts").mkdir(parents=True)
    manifest = writer.start(folder, Manifest(KEY, MADE, layout, SCALE, BIAS))
    for number in range(layout.parts):
        count = layout.count(number)
        known = torch.arange(count) % 7 != 3
        image = F.normalize(torch.randn(count, VIEWS, WIDTH), dim=-1) * known[:, None, None]
        each = torch.from_numpy(CAPTIONS[number * PART : number * PART + count] if captions else np.ones(count, np.int64)) * known
        text = F.normalize(torch.randn(int(each.sum()) if captions else count, WIDTH), dim=-1)
        text = text if captions else text * known[:, None]
        blocks = {name: torch.randn(count, VIEWS, *shape) for name, shape in layout.patch_tensors.items()}
        writer.write_part(folder, manifest, number, image, text, known, blocks, each if captions else None)
    writer.finish(folder, manifest)
    if formerly:
        stores.without_checks(folder)
    asked = {} if patches is None else ASKED
    return Original(folder, formerly, asked, _read(replace(Store.open(folder), asked=asked)))


def _read(store: Store) -> list[StoredRows]:
    index = np.arange(SAMPLES)
    return [store.read(index, np.full(SAMPLES, view), (CAPTIONS - 1) * view) for view in range(VIEWS)]  # the first caption, the last one


def _damaged(store: Path, draw: random.Random) -> str:
    parts = sorted((store / "parts").iterdir())
    kind = draw.choice(("values",) * 6 + ("bytes",) * 4 + ("header",) * 6 + ("manifest",) * 8 + ("files",) * 3)
    path = draw.choice(parts)
    if kind == "values":
        content = bytearray(path.read_bytes())
        values = len(safetensors_files.read(path)[1])
        places = [draw.randrange((len(content) - values) * 8, len(content) * 8) for _ in range(draw.choice((1, 1, 1, 2, 5)))]
        for place in places:
            content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        return f"{path.name}: bits {places} of values flipped"
    if kind == "bytes":
        return damage.bytes_of(draw.choice((*parts, store / "manifest.json")), draw)
    if kind == "header":
        return damage.header(path, draw)
    if kind == "manifest":
        return damage.json_file(store / "manifest.json", draw)
    return _files(store, path, parts, draw)


def _files(store: Path, path: Path, parts: list[Path], draw: random.Random) -> str:
    kind = draw.choice(("missing", "exchanged", "copied", "folder", "no parts", "no manifest", "manifest folder", "strange"))
    if kind == "exchanged":
        other = draw.choice([part for part in parts if part != path])
        aside = path.with_name("aside")
        path.rename(aside)
        other.rename(path)
        aside.rename(other)
    elif kind == "copied":
        shutil.copyfile(path, draw.choice([part for part in parts if part != path]))
    elif kind in ("missing", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    elif kind == "no parts":
        shutil.rmtree(store / "parts")
        (store / "parts").write_text("a file")
    elif kind in ("no manifest", "manifest folder"):
        (store / "manifest.json").unlink()
        if kind == "manifest folder":
            (store / "manifest.json").mkdir()
    else:
        (store / "parts" / ".000001.safetensors.xyz").write_bytes(b"half")
        (store / "parts" / "000009.safetensors").write_bytes(b"one too many")
    return f"{kind}: {path.name}"


def _attempt(original: Original, mutant: Path) -> str:
    store = Store.open(mutant)
    store.check_matches(KEY)
    if original.asked and store.layout.patches != PATCHES:
        raise SilentFault(f"{store.layout.patches}")
    store.asked = original.asked
    # Of format 1 nothing says which scale was written.
    if not original.formerly and (store.manifest.scale, store.manifest.bias) != (SCALE, BIAS):
        raise SilentFault(f"scale {store.manifest.scale}, bias {store.manifest.bias}")
    if store.parts and (store.layout.samples != SAMPLES or store.layout.views != VIEWS):
        raise SilentFault(f"{store.layout}")
    told = False
    for number, (found, truth) in enumerate(zip(_read(store), original.rows, strict=True)):
        for name in ("image", "text"):
            mine, theirs = (getattr(rows, name)[found.known].float() for rows in (found, truth))
            if not torch.equal(mine, theirs):
                raise SilentFault(f"view {number}: {name} rows are not what was written")
        for block, map_BhwC in found.patches.items():
            if not torch.equal(map_BhwC[found.known], truth.patches[block][found.known]):
                raise SilentFault(f"view {number}: patch tokens of block {block} are not what was written")
        lost = truth.known & ~found.known
        said = found.damaged.clone()
        for part in range(store.layout.parts):
            if part not in store.parts:
                said[part * PART : (part + 1) * PART] = True
        if bool((found.known & ~truth.known).any()) or bool((lost & ~said).any()):
            raise SilentFault(f"view {number}: {int((lost & ~said).sum())} samples are lost without a word")
        told |= bool(lost.any())
    if any(part not in store.parts for part in range(store.layout.parts)):
        assert "parts are not usable" in store.outline()
        told = True
    return "told" if told else "sound"
