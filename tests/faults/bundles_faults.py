"""Bundles that were changed on a disk or by hand: refused by the file's name, or loaded as the decoder that was written."""

from __future__ import annotations

import copy
import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from faults.campaign import Mutant, SilentFault
from megakd import recipe
from megakd.data.shapes.vocabulary import write_tokenizer
from megakd.export.bundle import Bundle
from megakd.export.manifest import MANIFEST
from megakd.runtime.files import json_sha256, sha256
from support.decoders import CPU, make_decoder, make_towers

NAME, COUNT, LIMIT, FEW = "bundles", 330, 60.0, 12
ASKED = ["how many squares are there ?", "what colour is it ?"]
Change = Callable[[Any], Any]
_VALUES: list[Any] = [None, True, False, 0, -1, 1, 2.5, 10**30, "", "x", "../x", [], [1], {}, {"a": 1}, "lora", "none", "\x00"]


def _original(folder: Path) -> Path:
    torch.set_num_threads(1)
    tokenizer = folder / "tokenizer"
    write_tokenizer(tokenizer)
    language = make_decoder(tokenizer, None, adapt="full")
    language.write_language(folder / "language")
    towers = make_towers(tokenizer)
    lora = recipe.Lora(rank=4, alpha=8.0, dropout=0.0)
    module = make_decoder(None, towers.clip.visual, model=str(folder / "language"), lora=lora)  # type: ignore[arg-type]
    Bundle(module, towers, 64).save(folder / "bundle", tower_inside=True)
    return folder / "bundle"


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    whole = _original(folder)
    right = _state(Bundle.load(whole, CPU))
    for number in range(count):
        copied = folder / "mutant"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(whole, copied)
        name = _damage(copied, draw, number)
        yield Mutant(name, functools.partial(_attempt, copied, right))


def _state(loaded: Bundle) -> dict[str, Any]:
    weights = {name: value.clone() for name, value in loaded.decoder.state_dict().items()}
    settings = loaded.decoder.settings.model_dump(exclude={"tokenizer", "model"})
    talk = loaded.conversations
    prompts = [talk.prompt(text, True, image=True) for text in ASKED]
    return {
        "weights": weights,
        "settings": settings,
        "prompts": prompts,
        "ends": loaded.decoder.description.ends,
        "length": loaded.max_length,
    }


def _attempt(folder: Path, right: dict[str, Any]) -> str:
    found = _state(Bundle.load(folder, CPU))
    weights, expected = found.pop("weights"), dict(right)
    if not all(torch.equal(value, weights[name]) for name, value in expected.pop("weights").items()):
        raise SilentFault("other weights")
    if found != expected:
        raise SilentFault(f"{found} in place of {expected}")
    return "sound"


def _damage(folder: Path, draw: random.Random, number: int) -> str:
    """Half of the mutants have a changed manifest, of which some were given a right checksum again, as by a person with a script."""
    kinds = (_manifest_value, _manifest_value, _manifest_text, _file_bytes, _file_list, _weights)
    return kinds[number % len(kinds)](folder, draw)


def _manifest_value(folder: Path, draw: random.Random) -> str:
    path = folder / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    before = copy.deepcopy(content)
    where: list[Any] = []
    inner: Any = content
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = draw.choice(keys)
        where.append(key)
        if isinstance(inner[key], (dict, list)) and inner[key] and draw.random() < 0.7:
            inner = inner[key]
            continue
        break
    action = draw.choice(["set", "set", "delete", "rename"]) if isinstance(inner, dict) else "set"
    value = draw.choice(_VALUES)
    if action == "set":
        inner[key] = value
    else:
        kept = inner.pop(key)
        if action == "rename":
            inner[f"{key}x"] = kept
    # A changed template or length under a right checksum is somebody's own bundle: only what cannot be one is signed again.
    signed = draw.random() < 0.3 and where[0] in ("files", "language", "tower", "versions") and content != before
    if signed and "sha256" in content:
        content["sha256"] = json_sha256({name: one for name, one in content.items() if name != "sha256"})
    path.write_text(json.dumps(content), encoding="utf-8")
    return f"bundle.json: {action} {where} {value!r}, signed: {signed}"


def _manifest_text(folder: Path, draw: random.Random) -> str:
    path = folder / MANIFEST
    text = path.read_bytes()
    kind = draw.choice(["cut", "flip", "deep", "utf-16", "latin", "bom", "twice", "empty", "list", "long number", "nan", "link"])
    place = draw.randrange(len(text))
    changed = {
        "cut": text[:place],
        "flip": text[:place] + bytes([text[place] ^ 1 << draw.randrange(8)]) + text[place + 1 :],
        "deep": b"[" * 10**5,
        "utf-16": text.decode().encode("utf-16"),
        "latin": text.replace(b"USER", b"\xff\xfe"),
        "bom": b"\xef\xbb\xbf" + text,
        "twice": text.replace(b'"max_length"', b'"max_length": 7, "max_length"', 1),
        "empty": b"",
        "list": b"[" + text + b"]",
        "long number": text.replace(b'"max_length": 64', b'"max_length": ' + b"9" * 5000),
        "nan": text.replace(b'"max_length": 64', b'"max_length": NaN'),
        "link": b"",
    }[kind]
    path.unlink()
    if kind == "link":
        path.symlink_to(folder)
    else:
        path.write_bytes(changed)
    return f"bundle.json: {kind} at {place}"


def _file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST))


def _file_bytes(folder: Path, draw: random.Random) -> str:
    path = _file(folder, draw)
    content = bytearray(path.read_bytes())
    kind = draw.choice(["cut", "flip", "delete", "empty", "longer", "folder"])
    place = draw.randrange(len(content))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "delete":
        content[place] ^= 1 << draw.randrange(8) if kind == "flip" else 0
        path.write_bytes({"cut": content[:place], "empty": b"", "longer": content + b"\0"}.get(kind, bytes(content)))
    return f"{path.relative_to(folder)}: {kind} at {place}"


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
    path = folder / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    if changed is not None:
        content["files"][changed.relative_to(folder).as_posix()] = {"bytes": changed.stat().st_size, "sha256": sha256(changed)}
    change(content)
    content["sha256"] = json_sha256({name: one for name, one in content.items() if name != "sha256"})
    path.write_text(json.dumps(content), encoding="utf-8")
