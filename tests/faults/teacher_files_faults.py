"""Damaged files of weights and configurations: both loaders give the model that was written, or refuse alike with one message."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from faults import damage
from faults.campaign import Mutant, SilentFault
from megakd.data.shapes.vocabulary import write_tokenizer
from megakd.models import clip as clip_models
from megakd.models import streaming
from megakd.recipe import Model
from megakd.runtime.launch import World
from support import safetensors_files

NAME, COUNT, LIMIT, FEW = "teacher_files", 400, 20.0, 24
HERE = World(0, 1, torch.device("cpu"))
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 128, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}
INDEX = "model.safetensors.index.json"
State = dict[str, Tensor]
HUGE = (10**6, 10**9, 10**18, -(10**9), 1e18)
SHAPES: dict[str, tuple[int, ...]] = {}


class Original:
    """The sound files of one small model, in every form in which weights are given."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = folder / "tokenizer"
        write_tokenizer(self.tokenizer)
        torch.manual_seed(0)
        described = clip_models.resolve(Model(architecture=ARCHITECTURE, tokenizer=str(self.tokenizer)), "student")
        clip = clip_models.build(described, HERE.device).clip
        self.state: State = {name: value + 0.01 * torch.randn(value.shape) for name, value in clip.state_dict().items()}
        save_file(self.state, folder / "model.safetensors")
        SHAPES.update({name: tuple(value.shape) for name, value in self.state.items()})
        self.bytes = (folder / "model.safetensors").read_bytes()
        self.header, self.data = safetensors_files.read(folder / "model.safetensors")


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    original = Original(folder / "original")
    kinds: list[Callable[[Original, random.Random, Path], tuple[str, Model, State | None]]] = [
        *(_cut, _header_of, _tensors, _tensors, _values, _pickled, _pickled, _index, _index, _config, _config, _raw, _architecture),
    ]
    for number in range(count):
        place = folder / f"{number}"
        place.mkdir()
        name, settings, state = kinds[number % len(kinds)](original, draw, place)
        yield Mutant(f"{number}: {name}", _attempt(settings, state))
        shutil.rmtree(place, ignore_errors=True)


def _attempt(settings: Model, state: State | None) -> Callable[[], str]:
    """state: what a sound reading of the mutant gives; None where there is none, and it has to be refused."""

    def attempt() -> str:
        described = clip_models.resolve(settings, "teacher")
        found = [_of_loader(lambda: clip_models.build(described, HERE.device)), _of_loader(lambda: streaming.load(described, HERE, "fp32"))]
        messages = [one for one in found if isinstance(one, ValueError)]
        if len(messages) == 1:
            raise SilentFault(f"one loader refuses ({messages[0]}), the other does not")
        if messages:
            if len({str(message).partition("(Error while")[0] for message in messages}) > 1:  # the library names any one tensor
                raise SilentFault(f"two messages: {messages[0]} and {messages[1]}")
            raise messages[0]
        for loaded in found:
            if state is None and _interpolated(loaded):
                return "told"
            if state is None:
                raise SilentFault("loaded, and should have been refused")
            assert not isinstance(loaded, ValueError)
            wrong = [name for name, value in state.items() if not torch.equal(loaded[name], value)]
            if wrong or loaded.keys() != state.keys():
                raise SilentFault(f"other values than were written: {wrong[:3]}")
        return "sound"

    return attempt


def _interpolated(loaded: State | ValueError) -> bool:
    """A tower of another resolution or context takes the positions in between, and a warning says so."""
    assert not isinstance(loaded, ValueError)
    return any(name in SHAPES and tuple(value.shape) != SHAPES[name] for name, value in loaded.items() if "positional" in name)


def _of_loader(load: Callable[[], clip_models.ClipModel]) -> State | ValueError:
    try:
        return load().clip.state_dict()  # type: ignore[no-any-return]
    except ValueError as error:
        return error


def _file(original: Original, path: Path) -> Model:
    return Model(architecture=copy.deepcopy(ARCHITECTURE), tokenizer=str(original.tokenizer), pretrained=str(path))


def _cut(original: Original, draw: random.Random, place: Path) -> tuple[str, Model, State | None]:
    path, whole = place / "m.safetensors", original.bytes
    kept = draw.choice([0, 1, 7, 8, 9, draw.randrange(len(whole)), len(whole) - 1])
    kind = draw.choice(["cut", "longer", "zeros", "lfs", "html", "gzip"])
    content = {
        "cut": whole[:kept],
        "longer": whole + bytes(draw.randrange(1, 9000)),
        "zeros": bytes(len(whole)),
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "gzip": b"\x1f\x8b\x08" + whole,
    }[kind]
    path.write_bytes(content)
    return f"{kind} at {kept}", _file(original, path), None


def _header_of(original: Original, draw: random.Random, place: Path) -> tuple[str, Model, State | None]:
    header: dict[str, Any] = copy.deepcopy(original.header)
    names = [name for name in header if name != "__metadata__"]
    name, path = draw.choice(names), place / "m.safetensors"
    kind = draw.choice(["offset", "shape", "dtype", "swap", "drop", "odd", "deep", "length", "text", "metadata", "duplicate"])
    content: Any = header
    state: State | None = None
    more = 0
    if kind == "offset":
        header[name]["data_offsets"] = [draw.choice([-4, 0, 10**15, 2**64]), draw.choice([0, 4, 10**15])]
    elif kind == "shape":
        header[name]["shape"] = draw.choice([[], [0], [-1], [2**40, 2**40], [1, *header[name]["shape"], 1], "x"])
    elif kind == "dtype":
        header[name]["dtype"] = draw.choice(["F16", "I32", "F99", "F8_E4M3", "", 3])
    elif kind == "swap":
        other = draw.choice([one for one in names if header[one]["shape"] != header[name]["shape"]])
        header[name], header[other] = header[other], header[name]
    elif kind == "drop":
        del header[name]
    elif kind == "odd":
        header[name] = draw.choice(damage.VALUES)
    elif kind == "deep":
        content = b'{"a":' * draw.choice([200, 10**5]) + b"1" + b"}" * 10
    elif kind == "length":
        more = draw.choice([-len(json.dumps(header)), 8, 2**32, 2**63])
    elif kind == "text":
        content = draw.choice([b"\xff" * 40, b"[]      ", b"null    ", b'{"a"    ', b"{}      "])
    elif kind == "metadata":
        header["__metadata__"] = draw.choice([{"format": "pt"}, {"a": "b" * 1000}])
        state = original.state
    else:
        text = json.dumps(header)
        content = (text[:-1] + f', "{name}": {json.dumps(header[draw.choice(names)])}}}').encode()
        state = original.state if json.loads(content) == header else None
    safetensors_files.write(path, content, original.data, more)
    return f"header {kind} of {name}", _file(original, path), state


def _changed(original: Original, draw: random.Random) -> tuple[str, State, State | None]:
    """A state with some tensors of it renamed, reshaped, missing or of another type, and what it should be read as."""
    state = dict(original.state)
    name = draw.choice([one for one in state if one != "logit_scale"])
    kind = draw.choice(
        ["missing", "unknown", "shape", "transposed", "int8", "half", "double", "prefix", "inner", "text alone", "scale", "twice", "case"]
    )
    good: State | None = None
    if kind == "missing":
        del state[name]
    elif kind == "unknown":
        state[draw.choice(["extra", "visual.extra.weight", "module", "teacher." + name])] = torch.ones(2)
    elif kind == "shape":
        state[name] = torch.ones(*(side + 1 for side in state[name].shape))
        if name.endswith("positional_embedding"):
            state[name] = state[name][:, :-2].contiguous()
    elif kind == "transposed":
        name = draw.choice(["text_projection", "transformer.resblocks.0.mlp.c_fc.weight", "transformer.resblocks.0.attn.in_proj_weight"])
        state[name] = state[name].T.contiguous()
    elif kind == "int8":
        state[name] = (state[name] * 100).to(torch.int8)
    elif kind in ("half", "double"):
        state[name] = state[name].to(torch.float16 if kind == "half" else torch.float64)
        good = {**original.state, name: state[name].float()}
    elif kind == "prefix":
        prefix = "".join(draw.choices(["module.", "_orig_mod.", "model.", "student."], k=draw.randrange(1, 4)))
        state = {prefix + one: value for one, value in state.items()}
        good = original.state
    elif kind == "inner":
        state = {one.replace("visual.", "visual._orig_mod."): value for one, value in state.items()}
        good = original.state
    elif kind == "text alone":
        state = {one: value for one, value in state.items() if not one.startswith("visual.")}
    elif kind == "scale":
        state["logit_scale"] = state["logit_scale"].reshape(1)
        good = original.state
    elif kind == "twice":
        state[f"module.{name}"] = state[name].clone()
    else:
        state = {one.upper() if one == name else one: value for one, value in state.items()}
    return f"{kind} {name}", state, good


def _tensors(original: Original, draw: random.Random, place: Path) -> tuple[str, Model, State | None]:
    name, state, good = _changed(original, draw)
    save_file(state, place / "m.safetensors")
    return name, _file(original, place / "m.safetensors"), good


def _values(original: Original, draw: random.Random, place: Path) -> tuple[str, Model, State | None]:
    state = {name: value.clone() for name, value in original.state.items()}
    name = draw.choice(list(state))
    value = draw.choice([float("nan"), float("inf"), -float("inf"), 3e38, -1e30])
    state[name].view(-1)[draw.randrange(state[name].numel())] = value
    suffix = draw.choice([".safetensors", ".pt"])
    path = place / f"m{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return f"{value} in {name}", _file(original, path), None


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


def _pickled(original: Original, draw: random.Random, place: Path) -> tuple[str, Model, State | None]:
    path = place / draw.choice(["m.pt", "m.pth", "m.bin"])
    name, state, good = _changed(original, draw)
    kind = draw.choice(
        ["plain", "state_dict", "model", "nested", "two", "code", "list", "odd", "bytes", "cut", "old", "optimizer", "script", "safe"]
    )
    content: Any = state
    if kind == "state_dict":
        content = {"epoch": 3, "state_dict": state, "name": "x"}
    elif kind == "model":
        content = {"model": state, "args": {"lr": 0.1}}
    elif kind == "nested":
        content = {"module": {"state_dict": state}}
    elif kind == "two":
        content, good = {"student": state, "teacher": dict(original.state)}, None
    elif kind == "code":
        content, good = {**state, "a": Code()}, None
    elif kind == "list":
        content, good = draw.choice([list(state.values()), 3, "text", None, {}, {"state_dict": {}}, {"state_dict": None}]), None
    elif kind == "odd":
        content, good = {**state, draw.choice(["epoch", 7]): draw.choice([3, "x", None, [1], torch.ones(2).to_sparse()])}, None
    elif kind == "optimizer":
        content = {"state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}}
    torch.save(content, path, _use_new_zipfile_serialization=kind != "old")
    if kind == "script":
        good = None
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    elif kind == "safe":
        good = None
        save_file(state, path)
    elif kind in ("bytes", "cut"):
        whole, good = bytearray(path.read_bytes()), None
        if kind == "cut":
            whole = whole[: draw.randrange(len(whole))]
        else:
            start = draw.choice([0, len(whole) - 30, draw.randrange(64)])
            whole[start : start + 20] = draw.randbytes(20)
        path.write_bytes(whole)
        if kind == "bytes" and start not in (0, len(whole) - 30):
            good = _if_torch_reads(path)
    return f"{path.suffix} {kind}, {name}", _file(original, path), good


def _if_torch_reads(path: Path) -> State | None:
    """What torch's own restricted reader makes of it: a changed byte may lie where nothing is read."""
    try:
        found = torch.load(path, weights_only=True)
    except Exception:
        return None
    return {name: value.float() for name, value in found.items()} if isinstance(found, dict) else None


def _index(original: Original, draw: random.Random, place: Path) -> tuple[str, Model, State | None]:
    owners = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(original.state)}
    for file in sorted(set(owners.values())):
        save_file({name: value for name, value in original.state.items() if owners[name] == file}, place / file)
    content: Any = {"metadata": {"total_size": 1}, "weight_map": owners}
    name = draw.choice(list(owners))
    damaged = ("outside", "gone", "wrong file", "odd owner", "odd map", "cut file", "deep", "cut", "encoding", "missing", "folder")
    kind, text = draw.choice(("sound", "bom", *damaged)), None
    if kind == "outside":
        owners[name] = draw.choice(["../model-0.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
    elif kind == "gone":
        (place / owners[name]).unlink()
    elif kind == "wrong file":
        owners[name] = next(file for file in set(owners.values()) if file != owners[name])
    elif kind == "odd owner":
        owners[name] = draw.choice([one for one in damage.VALUES if one not in ("x", "0", "32", "auto", "true")])
    elif kind == "odd map":
        content = draw.choice([{"weight_map": one} for one in damage.VALUES] + [*damage.VALUES])
    elif kind == "cut file":
        file = place / owners[name]
        file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])
    elif kind == "deep":
        text = draw.choice(['{"weight_map":' * 10**4, "[" * 10**6, '{"weight_map": ' + "9" * 10**5 + "}"])
    elif kind == "missing":
        del owners[name]
    elif kind == "folder":
        (place / owners[name]).unlink()
        (place / owners[name]).mkdir()
    text = json.dumps(content) if text is None else text
    if kind == "cut":
        text = text[: draw.randrange(len(text))]
    raw = text.encode({"encoding": "utf-16", "bom": "utf-8-sig"}.get(kind, "utf-8"))
    (place / INDEX).write_bytes(raw)
    return f"index {kind} of {name}", _file(original, place / INDEX), original.state if kind in ("sound", "bom") else None


def _of_changed_config(config: dict[str, Any], original: Original) -> State | None:
    """The same model when only what has no part in its weights was changed."""
    model = config.get("model_cfg") if isinstance(config.get("model_cfg"), dict) else {}
    same = all(model.get(key) == value for key, value in ARCHITECTURE.items())
    shapes_alone = isinstance(model, dict) and not same and _same_shapes(model)
    return original.state if same or shapes_alone else None


def _same_shapes(model: dict[str, Any]) -> bool:
    """Settings whose change keeps every shape: open_clip's own construction says which."""
    described = clip_models.ModelSpec("teacher", Model(architecture=model), model, {}, lambda texts: torch.zeros(len(texts), 1))
    try:
        clip_models.configuration(Model(architecture=model), "teacher")  # nothing huge is built
        clip = clip_models.build(described, torch.device("meta"), load_weights=False).clip
    except ValueError:
        return False
    return {name: tuple(value.shape) for name, value in clip.state_dict().items()} == SHAPES


def _config(original: Original, draw: random.Random, place: Path) -> tuple[str, Model, State | None]:
    model = copy.deepcopy(ARCHITECTURE)
    model["text_cfg"]["hf_tokenizer_name"] = "here"
    content: dict[str, Any] = {"model_cfg": model, "preprocess_cfg": dict(PREPROCESS)}
    for file in original.tokenizer.iterdir():
        shutil.copy(file, place / file.name)
    save_file(original.state, place / "open_clip_model.safetensors")
    kind = draw.choice(["harmed", "harmed", "harmed", "text", "several", "no weights"])
    name, state, text = kind, original.state if kind == "harmed" else None, None
    if kind == "harmed":
        name, _ = damage.json_value(content, draw, (*damage.VALUES, *HUGE))
        state = _of_changed_config(content, original)
    elif kind == "text":
        text = draw.choice(
            ["", "{", "[]", "null", "[" * 10**6, '{"model_cfg":' * 10**4, "\x00", json.dumps(content)[:-5], "NaN", "9" * 10**5]
        )
    elif kind == "several":
        for file in ("a.bin", "b.pth"):
            (place / "open_clip_model.safetensors").rename(place / "z.safetensors") if file == "a.bin" else None
            shutil.copy(place / "z.safetensors", place / file)
    else:
        (place / "open_clip_model.safetensors").unlink()
    raw = (json.dumps(content) if text is None else text).encode()
    (place / "open_clip_config.json").write_bytes(raw)
    return f"config {name}", Model(model=f"local-dir:{place}"), state


def _architecture(original: Original, draw: random.Random, place: Path) -> tuple[str, Model, State | None]:
    table = copy.deepcopy(ARCHITECTURE)
    name, _ = damage.json_value(table, draw, (*damage.VALUES, *HUGE))
    save_file(original.state, place / "m.safetensors")
    state = original.state if _same_shapes(copy.deepcopy(table)) else None
    settings = Model(architecture=table, tokenizer=str(original.tokenizer), pretrained=str(place / "m.safetensors"))
    return f"architecture {name}", settings, state


def _raw(original: Original, draw: random.Random, place: Path) -> tuple[str, Model, State | None]:
    """What is no file of weights at all, or not where it should be."""
    kind = draw.choice(["folder", "gone", "index of nothing", "npz", "text", "random", "link", "long name"])
    path = place / draw.choice(["m.safetensors", "m.pt", "m.bin"])
    if kind == "folder":
        path.mkdir()
    elif kind == "index of nothing":
        path = place / INDEX
        path.write_text('{"weight_map": {}}')
    elif kind == "npz":
        path = place / "m.npz"
        path.write_bytes(b"PK\x03\x04")
    elif kind == "text":
        path.write_text("weights\n" * 100)
    elif kind == "random":
        path.write_bytes(draw.randbytes(5000))
    elif kind == "link":
        path.symlink_to(place / "nowhere")
    elif kind == "long name":
        path = place / ("x" * 300 + ".safetensors")
    return f"{kind} {path.suffix}", _file(original, path), None
