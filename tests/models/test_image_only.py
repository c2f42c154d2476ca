"""Teachers that see images alone: what timm's models are as teachers, and settings that are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models import clip, image_only, streaming
from megakd.models.fingerprint import fingerprint, preprocessing
from megakd.models.pretrained import tag_of
from megakd.recipe import Student, Teacher
from megakd.recipe.placements import MODES
from megakd.runtime import launch
from megakd.runtime.launch import World
from megakd.teachers.build import load
from support.image_teachers import default_cfgs

KINDS = ("dino", "dinov3", "sam", "classifier")


def settings(kind: str, **more: Any) -> Teacher:
    return Teacher(**{"model": f"timm:megakd_tiny_{kind}", "pretrained": "random", **more})


def own(kind: str) -> nn.Module:
    """timm's model, classifier and all, whose norms and biases are not 1 and 0."""
    torch.manual_seed(3)
    model: nn.Module = timm.create_model(f"megakd_tiny_{kind}").eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(model: nn.Module, path: Path, prefix: str = "", **more: Tensor) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({f"{prefix}{name}": value.contiguous() for name, value in (model.state_dict() | more).items()}, path)
    return path


def images(model: Any, count: int = 3) -> Tensor:
    return torch.randn(count, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))


@pytest.fixture
def alone() -> Iterator[World]:
    yield launch.start()
    launch.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_sees_what_timms_own_model_does_wherever_its_weights_lie(kind: str, alone: World, tmp_path: Path) -> None:
    original: Any = own(kind)
    file = saved(original, tmp_path / "first" / "weights.safetensors")
    pixels = images(original)
    last, maps = original.forward_intermediates(pixels, norm=False, output_fmt="NCHW")
    pooled = original.forward_head(last, pre_logits=True) if kind == "classifier" else original(pixels)
    more: dict[str, Any] = {"preprocess": "first"} if kind == "classifier" else {}
    for mode in MODES:
        description = clip.resolve(settings(kind, pretrained=str(file), mode=mode, **more), "teacher")
        teacher = load(description, alone, streaming.Int8() if mode.endswith("int8") else None)
        found = teacher.embed(pixels, description.tokenize(["a", "b", "c"]), (0, -2, -1))
        exact = {"rtol": 0.0, "atol": 0.03 if mode.endswith("int8") else 1e-5}
        torch.testing.assert_close(found.image, F.normalize(pooled, dim=-1), **exact)
        for block in (0, -2, -1):
            expected_BhwC = maps[block].permute(0, 2, 3, 1)
            size = float(expected_BhwC.abs().max())
            torch.testing.assert_close(found.features[f"patches.{block}"] / size, expected_BhwC / size, **exact)
        assert found.text.shape == (3, 0)
        assert not found.has_text
        assert bool(found.scale.isnan())
        assert found.bias is None


def test_images_are_prepared_as_timms_tag_says() -> None:
    def prepared(**more: Any) -> tuple[Any, ...]:
        found = preprocessing(clip.resolve(settings(**{"kind": "classifier", "pretrained": "first", **more}), "teacher"))
        return found.size, found.mean, found.std, found.interpolation, found.resize_mode

    halves, usual = ((0.5, 0.5, 0.5), (0.5, 0.4, 0.3)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert default_cfgs["megakd_tiny_dino"].default.mean == usual[0]
    assert prepared() == ((32, 32), *halves, "bilinear", "shortest")
    assert prepared(kind="dino") == ((42, 42), *usual, "bicubic", "shortest")
    assert prepared(pretrained="random", preprocess="second") == ((32, 32), *usual, "bicubic", "shortest")
    own_mean = prepared(preprocess={"mean": [0.1, 0.2, 0.3], "resize_mode": "squash"})
    assert own_mean == ((32, 32), (0.1, 0.2, 0.3), halves[1], "bilinear", "squash")


def test_weights_of_a_tag_are_those_of_timms_repository() -> None:
    known = Teacher(model="timm:vit_small_patch14_reg4_dinov2", pretrained="lvd142m")
    assert tag_of(known) == {"hf_hub": "timm/vit_small_patch14_reg4_dinov2.lvd142m/model.safetensors"}
    assert clip.resolve(known, "teacher").config == {
        "embed_dim": 384,
        "vision_cfg": {"timm_model_name": "vit_small_patch14_reg4_dinov2.lvd142m", "image_size": [518, 518]},
    }


@pytest.mark.parametrize("place", ["folder", "wrapped", "as a tower"])
def test_files_are_read_under_timms_names_and_those_of_wrappers(place: str, alone: World, tmp_path: Path) -> None:
    original = own("dino")
    prefix = {"folder": "", "wrapped": "module.", "as a tower": "visual.trunk."}[place]
    more = {} if prefix else {"mask_token": torch.ones(1, 48)}  # what DINOv2 trained its masks with
    file = saved(original, tmp_path / "snapshot" / "model.safetensors", prefix, **more)
    given = str(file.parent if place == "folder" else file)
    pixels = images(original)
    for mode in ("replicated", "replicated_int8"):
        description = clip.resolve(settings("dino", pretrained=given, mode=mode), "teacher")
        found = load(description, alone, streaming.Int8() if mode.endswith("int8") else None).embed_images(pixels)
        torch.testing.assert_close(found, F.normalize(original(pixels), dim=-1), rtol=0.0, atol=0.03)
    key = fingerprint(description, 0)
    assert key["weights"]["sha256"] is not None
    assert key["teacher"]["vision_cfg"]["image_size"] == [42, 42]


def test_weights_of_another_model_are_refused_by_their_tensors(tmp_path: Path) -> None:
    file = saved(own("sam"), tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"teacher: .*not the weights of this architecture. missing: visual.trunk.*not of this model: .*save the"
    ):
        clip.build(clip.resolve(settings("dino", pretrained=str(file)), "teacher"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "timm:megakd_tiny_dyno"}, "teacher.model = 'timm:megakd_tiny_dyno': timm has no such model; nearest: megakd_tiny_dino"),
        ({"model": "timm:megakd_tiny_dino.first"}, "write the tag as teacher.pretrained = 'first', and teacher.model = 'timm:megakd"),
        ({"pretrained": None}, "teacher.pretrained: missing; a teacher needs weights: a tag, a file, or 'random'"),
        ({"pretrained": "second"}, "'second': neither a file .*, a folder nor a tag of timm's megakd_tiny_dino; tags: first"),
        ({"tokenizer": "words"}, "teacher.tokenizer = 'words': timm:megakd_tiny_dino has no text tower to read its words; take it out"),
        ({"store": "rows"}, "teacher.store = 'rows': timm:megakd_tiny_dino has no text tower, and a store holds embeddings of pairs"),
        ({"scale": 70.0}, "teacher.scale = 70.0: timm:megakd_tiny_dino has no text tower, and so no logits to scale; take it out"),
        ({"preprocess": "third"}, "teacher.preprocess = 'third': no tag of timm's megakd_tiny_dino; tags: first"),
        ({"model": "timm:megakd_tiny_classifier", "pretrained": "second"}, "timm has its weights from elsewhere than its repo"),
        ({"model": "timm:megakd_tiny_classifier", "pretrained": "a.pt"}, "set teacher.preprocess to the tag whose it is: first, second"),
        ({"model": "timm:megakd_tiny_hiera", "mode": "zero3"}, "'zero3': layers of timm's Hiera are not known in 8 bit or partitioned"),
        ({"model": "timm:megakd_tiny_hiera", "mode": "replicated_int8"}, "layers of timm's Hiera are not known in 8 bit or partitioned"),
        ({"model": "hf:facebook/dinov2-base"}, "teachers of images alone are timm's, for example 'timm:vit_base_patch14_reg4_dinov2'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_their_key(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip.resolve(settings("dino", **more), "teacher")


def test_an_empty_folder_and_a_student_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a folder without weights \(model.safetensors\)"):
        clip.resolve(settings("dino", pretrained=str(tmp_path)), "teacher")
    with pytest.raises(
        ValueError, match="'timm:megakd_tiny_dino': has no text tower, and only a teacher can be without one; for a student"
    ):
        clip.resolve(Student(model="timm:megakd_tiny_dino"), "student")


def test_captions_have_no_words() -> None:
    tokens = image_only.no_words(["a caption", "another"])
    assert tokens.shape == (2, 0)
    assert tokens.dtype == torch.long
