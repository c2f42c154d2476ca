"""A small store of teacher embeddings, written as `megakd embed` writes one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from megakd.data.store import writer
from megakd.data.store.reader import Layout, Manifest, part_path
from megakd.recipe import Recipe
from megakd.runtime.launch import World
from megakd.teachers.embed import EmbedJob, EmbedRequest
from support import safetensors_files

# 43 samples in parts of 8: five whole ones and one of 3.
LAYOUT = Layout(samples=43, part=8, views=3, width=5, dtype="fp32")
KEY = {"teacher": {"embed_dim": 5}, "weights": {"name": "a b", "sha256": "12"}, "seed": 7, "views": {"flip": 0.5, "crop_scale": [0.5, 1.0]}}
MANIFEST = Manifest(KEY, {"precision": "fp32"}, LAYOUT, 14.285714149475098, None)
UNUSABLE = (3, 17, 42)


def values(layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """image (samples, V, D), text (samples, D), known (samples,) of a whole set."""
    generator = torch.Generator().manual_seed(0)
    known = torch.ones(layout.samples, dtype=torch.bool)
    known[list(UNUSABLE)] = False
    image = torch.randn((layout.samples, layout.views, layout.width), generator=generator) * known[:, None, None]
    return image, torch.randn((layout.samples, layout.width), generator=generator) * known[:, None], known


def patch_values(layout: Layout) -> dict[str, torch.Tensor]:
    """(samples, V, h, w, C) of each block of a whole set, by its name."""
    generator, known = torch.Generator().manual_seed(1), values(layout)[2]
    return {
        name: torch.randn((layout.samples, layout.views, *shape), generator=generator) * known[:, None, None, None, None]
        for name, shape in layout.patch_tensors.items()
    }


def write(folder: Path, manifest: Manifest = MANIFEST) -> Path:
    folder.mkdir(exist_ok=True)
    writer.start(folder, manifest)
    image, text, known = values(manifest.layout)
    patches = patch_values(manifest.layout)
    for number in range(manifest.layout.parts):
        rows = slice(number * manifest.layout.part, (number + 1) * manifest.layout.part)
        writer.write_part(
            folder, manifest, number, image[rows], text[rows], known[rows], {name: one[rows] for name, one in patches.items()}
        )
    writer.finish(folder, manifest)
    return folder


def write_stores(recipe: Recipe, folder: Path) -> Path:
    """Stores of a recipe's teacher, two views each, as `megakd embed` writes them: whole in both types, and with parts taken away."""
    for dtype in ("fp32", "bf16"):
        EmbedJob(recipe, EmbedRequest(folder / dtype, 2, dtype), World(0, 1, torch.device("cpu")), part=64).embed()
    parts = len(list((folder / "fp32" / "parts").iterdir()))
    for name, missing in (("empty", range(parts)), ("partial", range(0, parts, 2))):
        shutil.copytree(folder / "fp32", folder / name)
        for number in missing:
            part_path(folder / name, number).unlink()
    return folder


def without_checks(folder: Path) -> None:
    """Make a store what versions wrote that knew no checks of rows and of the manifest."""
    for path in (folder / "parts").iterdir():
        header, data = safetensors_files.read(path)
        note = json.loads(header["__metadata__"]["megakd"])
        del note["checks"]
        header["__metadata__"]["megakd"] = json.dumps(note)
        safetensors_files.write(path, header, data)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 1}
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
