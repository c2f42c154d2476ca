"""Files of weights: what is read when, what is refused, and what a killed conversion leaves behind."""

from __future__ import annotations

import collections
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd.models import weights
from megakd.models.weights import SafetensorsFiles, convert, open_weights, write
from support.processes import python
from support.runs import wait_for

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scale": torch.tensor(3.25),
    "empty": torch.zeros(0, 4),
    "codes": torch.tensor([[1, -128], [127, 0]], dtype=torch.int8),
    "step": torch.tensor(7),
    "mask": torch.tensor([True, False, True]),
}


def _same(files: SafetensorsFiles) -> None:
    assert files.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        found = files.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_one_file_is_read_tensor_by_tensor_and_the_bytes_are_counted(file: Path) -> None:
    files = open_weights(file)
    assert files.bytes_read == 0
    _same(files)
    assert files.bytes_read == sum(tensor.nbytes for tensor in TENSORS.values())


def test_several_files_are_read_through_their_index(tmp_path: Path) -> None:
    names = list(TENSORS)
    owners = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    for part in set(owners.values()):
        save_file({name: TENSORS[name] for name in names if owners[name] == part}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": owners}))
    _same(open_weights(index))


def test_a_tensor_that_its_file_does_not_have_is_named(file: Path) -> None:
    index = file.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(TENSORS, file.name), "b.weight": file.name}}))
    with pytest.raises(ValueError, match=r"b\.weight"):
        open_weights(index)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_truncated_file_is_refused_by_name_before_anything_is_read(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: no complete safetensors file"):
        open_weights(file)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_crash(file: Path) -> None:
    files = open_weights(file)
    os.truncate(file, file.stat().st_size - 1)
    last = max(TENSORS, key=lambda name: files._places[name].start + files._places[name].length)
    with pytest.raises(ValueError, match=rf"the file ends inside of '{last}'"):
        files.read(last)


def test_a_written_file_is_what_the_library_reads(tmp_path: Path) -> None:
    write(tmp_path / "w.safetensors", {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}, TENSORS.__getitem__)
    found = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    _same(open_weights(tmp_path / "w.safetensors"))


def test_a_failed_writing_leaves_no_file(tmp_path: Path) -> None:
    def tensors(name: str) -> torch.Tensor:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write(tmp_path / "w.safetensors", {"a": (torch.float32, (2,))}, tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickled_file_is_converted_once_and_again_when_it_changed(tmp_path: Path, wrapped: bool, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    state = dict(TENSORS)
    torch.save({"epoch": 3, "state_dict": state} if wrapped else state, path, _use_new_zipfile_serialization=zipped)
    opened = open_weights(path)
    _same(opened)
    assert opened.origin == str(path)
    first = convert(path)
    assert first.parent == tmp_path
    written = first.stat().st_mtime_ns
    assert convert(path) == first
    assert first.stat().st_mtime_ns == written
    torch.save({"only": torch.ones(2)}, path)
    assert convert(path) != first
    assert open_weights(path).shapes == {"only": (2,)}


def test_a_conversion_goes_to_the_users_cache_where_the_folder_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "read_only" / "model.bin"
    path.parent.mkdir()
    torch.save(TENSORS, path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # root may write anywhere: the folder is declared unwritable instead of made so
    monkeypatch.setattr(weights, "_writable", lambda folder: folder != path.parent and folder.mkdir(parents=True) is None)
    assert convert(path).is_relative_to(tmp_path / "cache")
    _same(open_weights(path))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("content", [Evil(), {"a": Evil()}, [torch.ones(1)], {"a": "text"}, {}, collections.OrderedDict()])
def test_what_is_no_table_of_tensors_is_refused_and_not_executed(tmp_path: Path, content: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: n"):
        open_weights(tmp_path / "model.pt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.bin", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "told"), [(b"", "empty"), (LFS, "git lfs pull"), (b"<!DOCTYPE html><html>", "web page"), (b"\n<HTML>", "web page")]
)
def test_a_file_that_is_something_else_is_told_what_it_is(content: bytes, told: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    for load in (open_weights, weights.in_memory):
        with pytest.raises(ValueError, match=told):
            load(tmp_path / name)


def test_a_file_under_another_kinds_suffix_is_told_its_own(tmp_path: Path, file: Path) -> None:
    torch.save(TENSORS, tmp_path / "pickled.safetensors")
    with pytest.raises(ValueError, match=r"rename it to pickled\.pt"):
        open_weights(tmp_path / "pickled.safetensors")
    file.rename(tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"rename it to plain\.safetensors"):
        open_weights(tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="a folder; name the file of weights"):
        open_weights(tmp_path)


def test_a_header_whose_length_begins_as_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    for length in range(1, 60):
        save_file({"a" * length: torch.ones(1), "b": torch.ones(1)}, tmp_path / "m.safetensors")
        if (tmp_path / "m.safetensors").read_bytes()[0] == 0x80:
            break
    assert open_weights(tmp_path / "m.safetensors").shapes["b"] == (1,)


def test_a_program_as_openai_published_them_is_refused(tmp_path: Path) -> None:
    # No Linear: DeepSpeed's ZeRO-3, in an earlier test of this process, leaves a form of it that cannot be scripted.
    torch.jit.script(torch.nn.LayerNorm(2)).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(ValueError, match=r"TorchScript archive.*tag 'openai' of the -quickgelu model"):
        open_weights(tmp_path / "ViT-B-32.pt")


@pytest.mark.parametrize("content", [{1: torch.ones(1)}, {"a": torch.ones(1).to_sparse()}, {"a": torch.ones(1, dtype=torch.complex64)}])
def test_tensors_that_are_not_plain_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: "):
        open_weights(tmp_path / "model.pt")


INDEX = r"m\.safetensors\.index\.json"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        *((text, INDEX) for text in ("[" * 10**5, "{", "[]", '{"weight_map": []}', "{}")),
        *((f'{{"weight_map": {{"a": {owner}}}}}', INDEX) for owner in ("3", '""', '".."')),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', f"{INDEX}.*not beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors"),
        ("{}", "weight_map"),
    ],
)
def test_an_index_that_is_none_or_leads_nowhere_is_refused_by_name(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        open_weights(tmp_path / "m.safetensors.index.json")


KILLED = """
import sys, time
from pathlib import Path
from megakd.models import weights
original = weights.write
def slow(path, layout, tensors):
    def one_and_wait(name):
        if name == "a.bias":
            print("half", flush=True)
            time.sleep(60)
        return tensors(name)
    original(path, layout, one_and_wait)
weights.write = slow
weights.convert(Path(sys.argv[1]))
"""


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(TENSORS, path)
    child = python("-c", KILLED, path)
    wait_for(lambda: any(entry.suffix == ".partial" for entry in tmp_path.iterdir()), child)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (part,) = tmp_path.glob("*.partial")
    assert not list(tmp_path.glob("*.safetensors"))
    old = part.stat().st_mtime - 2 * weights.ABANDONED_SECONDS
    os.utime(part, (old, old))
    _same(open_weights(path))
    assert not list(tmp_path.glob("*.partial"))
