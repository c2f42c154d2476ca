"""Bundles that were changed on a disk or by hand: refused by the file's name, or loaded as the decoder that was written."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from faults import damage
from faults.campaign import Mutant, SilentFault, mutants_of_copies
from megakd import recipe
from megakd.data.shapes.vocabulary import write_tokenizer
from megakd.export.bundle import Bundle
from megakd.export.manifest import MANIFEST
from megakd.runtime.files import json_sha256, sha256
from support.decoders import CPU, make_decoder, make_towers

NAME, COUNT, LIMIT, FEW = "bundles", 330, 60.0, 12
ASKED = ["how many squares are there ?", "what colour is it ?"]
VALUES = (*damage.VALUES, "lora", "none")


class Original(NamedTuple):
    folder: Path
    state: dict[str, Any]


def _original(folder: Path) -> Original:
    torch.set_num_threads(1)
    tokenizer = folder / "tokenizer"
    write_tokenizer(tokenizer)
    language = make_decoder(tokenizer, None, adapt="full")
    language.write_language(folder / "language")
    towers = make_towers(tokenizer)
    lora = recipe.Lora(rank=4, alpha=8.0, dropout=0.0)
    module = make_decoder(None, towers.clip.visual, model=str(folder / "language"), lora=lora)  # type: ignore[arg-type]
    Bundle(module, towers, 64).save(folder / "bundle", tower_inside=True)
    return Original(folder / "bundle", _state(Bundle.load(folder / "bundle", CPU)))


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    return mutants_of_copies(count, draw, folder, [_original(folder)], _damage, _attempt)


def _state(loaded: Bundle) -> dict[str, Any]:
    talk = loaded.prompts
    return {
        "weights": {name: value.clone() for name, value in loaded.decoder.state_dict().items()},
        "settings": loaded.decoder.settings.model_dump(exclude={"tokenizer", "model"}),
        "prompts": [talk.prompt(text, True, image=True) for text in ASKED],
        "ends": loaded.decoder.description.ends,
        "length": loaded.max_length,
    }


def _attempt(original: Original, folder: Path) -> str:
    found, expected = _state(Bundle.load(folder, CPU)), dict(original.state)
    weights = found.pop("weights")
    if not all(torch.equal(value, weights[name]) for name, value in expected.pop("weights").items()):
        raise SilentFault("other weights")
    if found != expected:
        raise SilentFault(f"{found} in place of {expected}")
    return "sound"


def _damage(folder: Path, draw: random.Random) -> str:
    """Half of the mutants have a changed manifest, of which some were given a right checksum again, as by a person with a script."""
    return draw.choice((_manifest_value, _manifest_value, _manifest_text, _file_bytes, _file_list, _weights))(folder, draw)


def _manifest_value(folder: Path, draw: random.Random) -> str:
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    before = copy.deepcopy(content)
    name, (first, *_) = damage.json_value(content, draw, VALUES)
    # A changed template or length under a right checksum is somebody's own bundle: only what cannot be one is signed again.
    signed = draw.random() < 0.3 and first in ("files", "language", "tower", "versions") and content != before
    _write(folder, content, signed=signed and "sha256" in content)
    return f"bundle.json: {name}, signed: {signed}"


def _manifest_text(folder: Path, draw: random.Random) -> str:
    path = folder / MANIFEST
    name, content = damage.json_text(path.read_text(encoding="utf-8"), draw)
    if draw.random() < 0.1:
        path.unlink()
        path.symlink_to(folder)
        return "bundle.json: a link to its folder"
    path.write_bytes(content)
    return f"bundle.json: {name}"


def _file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST))


def _file_bytes(folder: Path, draw: random.Random) -> str:
    path = _file(folder, draw)
    kind = draw.choice(["delete", "folder", *["bytes"] * 4])
    if kind == "bytes":
        return damage.bytes_of(path, draw)
    path.unlink()
    if kind == "folder":
        path.mkdir()
    return f"{path.relative_to(folder)}: {kind}"


def _file_list(folder: Path, draw: random.Random) -> str:
    """Files and their list changed together, with a right checksum: what is there is not what the manifest speaks of."""
    kind = draw.choice(["no files", "drop", "add", "escape", "absolute", "other part", "foreign"])
    path = _file(folder, draw)
    name = path.relative_to(folder).as_posix()

    def change(content: dict[str, Any]) -> None:
        files = content["files"]
        if kind == "no files":
            files.clear()
        elif kind == "drop":
            del files[name]
            if draw.random() < 0.5:
                path.unlink()
        elif kind == "add":
            (folder / "tokenizer" / "added_tokens.json").write_text("{}", encoding="utf-8")
        elif kind == "foreign":
            (folder / "language").mkdir(exist_ok=True)
            (folder / "language" / "config.json").write_text("{}", encoding="utf-8")
            files["language/config.json"] = {"bytes": 2, "sha256": sha256(folder / "language" / "config.json")}
        elif kind == "other part":
            content[draw.choice(["tower", "language"])] = None
        else:
            files["../bundle/" + name if kind == "escape" else str(folder / name)] = files.pop(name)

    _signed(folder, change)
    return f"files: {kind} {name}"


def _weights(folder: Path, draw: random.Random) -> str:
    """Weights of another shape, name or value under a right checksum."""
    path = draw.choice([folder / "projector.safetensors", folder / "adapter" / "adapter_model.safetensors"])
    weights = load_file(path)
    name = draw.choice(sorted(weights))
    kind = draw.choice(["drop", "shape", "nan", "rename", "infinite", "more", "no safetensors"])
    if kind in ("drop", "rename"):
        kept = weights.pop(name)
        weights |= {f"{name}x": kept} if kind == "rename" else {}
    elif kind == "shape":
        weights[name] = weights[name][:-1].clone()
    elif kind in ("nan", "infinite"):
        weights[name].view(-1)[draw.randrange(weights[name].numel())] = float("nan" if kind == "nan" else "inf")
    elif kind == "more":
        weights["more"] = torch.zeros(2)
    save_file(weights, path)
    if kind == "no safetensors":
        path.write_bytes(b"\x80\x04K\x01.")
    _signed(folder, lambda content: None, path)
    return f"{path.name}: {kind} {name}"


def _signed(folder: Path, change: Callable[[dict[str, Any]], None], changed: Path | None = None) -> None:
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if changed is not None:
        content["files"][changed.relative_to(folder).as_posix()] = {"bytes": changed.stat().st_size, "sha256": sha256(changed)}
    change(content)
    _write(folder, content, signed=True)


def _write(folder: Path, content: dict[str, Any], *, signed: bool) -> None:
    if signed:
        content["sha256"] = json_sha256({name: one for name, one in content.items() if name != "sha256"})
    (folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
