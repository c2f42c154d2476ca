"""ONNX files of a model's towers, run by onnxruntime: embeddings are the model's own, in batches of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from PIL import Image
from tokenizers import Tokenizer
from torch import nn

from megakd import recipe
from megakd.data.transforms import evaluation_pixels
from megakd.export import onnx_files, onnx_run, tokenizer_file, trial_inputs
from megakd.export.command import check
from megakd.export.options import Options
from megakd.models import clip
from megakd.models.clip import ClipModel
from megakd.runtime import console
from support.small_towers import TOWERS, small_student


@pytest.mark.parametrize("kind", TOWERS)
def test_onnxruntime_gives_the_models_embeddings_of_any_number_of_images_and_texts(
    kind: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.05)
    built = small_student(kind, world / "tokenizer")
    texts = kind in ("native", "siglip")  # the others have the same text tower as the first
    lines = onnx_files.write(built, tmp_path, ["fp16", "int8"] if kind == "native" else [], texts=texts)
    assert (tmp_path / "text.onnx").exists() == texts
    assert capsys.readouterr().err.startswith(f"exporting: 0 of {6 if kind == 'native' else 1 + texts} files\n")
    model: Any = built.clip
    given = {"image": trial_inputs.pixels(built), "text": trial_inputs.tokens(built.description)}
    for name, encode in (("image", model.encode_image), ("text", model.encode_text))[: 1 + texts]:
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        assert entry.shape[0] == "batch"
        for count in (1, 3, 8):
            (found,) = session.run(None, {entry.name: given[name][:count].numpy()})
            assert trial_inputs.difference(torch.from_numpy(found), encode(given[name][:count])) < 1e-5
            np.testing.assert_allclose(found, encode(given[name][:count]).numpy(), rtol=1e-3, atol=1e-4)  # not of length 1
        written = onnx.load(tmp_path / f"{name}.onnx")
        assert [one.version for one in written.opset_import if not one.domain] == [onnx_files.OPSET]
        assert str(Path(torch.__file__).parent).encode() not in (tmp_path / f"{name}.onnx").read_bytes()
    assert any(line.startswith("image.onnx: ") and "opset 18" in line for line in lines)
    if kind == "native":
        sizes = {name: (tmp_path / f"image{name}.onnx").stat().st_size for name in ("", ".fp16", ".int8")}
        assert sizes[".fp16"] < 0.7 * sizes[""]
        assert sizes[".int8"] < 0.7 * sizes[""]
        least = {name: float(line.split()[-3]) for line in lines for name in ("fp16", "int8") if line.startswith(f"image.{name}.onnx")}
        assert least["fp16"] > 0.9999
        assert 0.9 < least["int8"] < least["fp16"]


@pytest.fixture(scope="module")
def native(world: Path) -> ClipModel:
    return small_student("native", world / "tokenizer")


def test_an_image_and_a_text_are_prepared_from_the_folder_alone(native: ClipModel, tmp_path: Path) -> None:
    """As the README's example does, with PIL, numpy and tokenizers."""
    onnx_files.write_description(native, tmp_path)
    about = json.loads((tmp_path / "preprocess.json").read_text(encoding="utf-8"))
    prepared, picture = about["image"], Image.linear_gradient("L").convert("RGB")
    assert (prepared["resize_mode"], prepared["interpolation"]) == ("shortest", "bicubic")
    small = np.asarray(picture.resize(prepared["size"][::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(small, evaluation_pixels(picture, native.preprocess))
    words = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = ["a red circle", "two small blue squares"]
    assert about["text"] == {"context_length": 16, "cleaned": "whitespace"}
    assert [words.encode(text).ids for text in texts] == native.description.tokenize(texts).tolist()


def test_clips_own_tokenizer_becomes_one_file(tmp_path: Path) -> None:
    description = clip.resolve(recipe.Student(model="ViT-S-32"), "student")
    assert "own tokens" in tokenizer_file.write(description, tmp_path)
    words = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = ["a photo of a dog", "it's 12 o'clock! " * 40, ""]
    assert [words.encode(text.strip()).ids for text in texts] == description.tokenize(texts).tolist()
    assert tokenizer_file.cleaning(description) == "lower"


def test_weights_over_two_gigabytes_lie_in_a_file_beside(native: ClipModel, tmp_path: Path) -> None:
    """Here of a small tower, told to do so."""
    layer = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).eval()
    rows = torch.randn(5, 64)
    onnx_files.export(layer, "input", "found", rows[:2], tmp_path / "image.onnx", external=True)
    assert (tmp_path / "image.onnx.data").stat().st_size >= 4 * 64 * 64
    found = onnx_run.embeddings(tmp_path / "image.onnx", rows.numpy())
    torch.testing.assert_close(torch.from_numpy(found), layer(rows).detach(), rtol=1e-4, atol=1e-5)


def test_a_tower_without_onnx_in_the_newer_exporter_takes_the_older_one(tmp_path: Path) -> None:
    """Attention of three axes, as SAM's: `torch.export` takes it, and its ONNX does not."""

    class Attending(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(pixels, pixels, pixels)

    rows = torch.randn(5, 4, 8)
    how = onnx_files.export(Attending(), "pixels", "image_embeds", rows[:2], tmp_path / "image.onnx", external=False)
    assert "TorchScript" in how
    found = onnx_run.embeddings(tmp_path / "image.onnx", rows.numpy())
    torch.testing.assert_close(torch.from_numpy(found), Attending()(rows), rtol=1e-4, atol=1e-5)


def test_a_tower_that_torch_cannot_export_is_refused_by_its_reason(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels if float(pixels.sum()) > 0 else -pixels

    with pytest.raises(ValueError, match=r"image\.onnx: torch cannot export this tower to ONNX: \w+"):
        onnx_files.export(Branching(), "pixels", "image_embeds", torch.ones(2, 3), tmp_path / "image.onnx", external=False)


def test_a_file_that_onnxruntime_cannot_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "image.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"image\.onnx: onnxruntime does not run it: .*"):
        onnx_run.embeddings(tmp_path / "image.onnx", np.zeros((2, 3), np.float32))


def _permuted(path: Path, weight: np.ndarray[Any, Any]) -> None:
    """Rows are permuted, then multiplied by a matrix, in its type."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), helper.make_node("MatMul", ["t", "w"], ["y"])]
    ends = [helper.make_tensor_value_info(name, kind, shape) for name, shape in (("x", ["b", 4, 8]), ("y", [4, "b", 8]))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def test_a_file_that_ends_onnxruntime_ends_no_export(tmp_path: Path) -> None:
    """onnxruntime 1.32 has a segmentation fault on these two nodes in float16. A version that has none needs no `_transposed_late`."""
    _permuted(tmp_path / "image.onnx", np.ones((8, 8), np.float16))
    with pytest.raises(ValueError, match=r"image\.onnx: onnxruntime ended with SIGSEGV on it"):
        onnx_run.embeddings(tmp_path / "image.onnx", np.ones((1, 4, 8), np.float16))


def test_a_matrix_after_a_permutation_of_rows_runs_in_float16(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    _permuted(tmp_path / "a.onnx", weight)
    onnx_files.PRECISIONS_OF["fp16"](tmp_path / "a.onnx", tmp_path / "b.onnx", external=False)
    rows = np.random.default_rng(1).normal(size=(1, 4, 8)).astype(np.float32)
    np.testing.assert_allclose(onnx_run.embeddings(tmp_path / "b.onnx", rows), (rows @ weight).transpose(1, 0, 2), atol=0.03)


def test_precisions_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="--precision int4: one of fp16, int8"):
        check("onnx", Options(precision=("fp16,int4",)))
    with pytest.raises(ValueError, match="--precision fp16: is of --to onnx"):
        check("open_clip", Options(precision=("fp16",)))
    assert onnx_files.chosen(("fp16,int8", "fp16")) == ["fp16", "int8"]
