"""Named models for images of another size than their own, `image_size`: open_clip's `force_image_size` bit for bit, by every way to load
them, in what is planned, stored, trained, exported and scored; and sizes that are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import load_file, save_file

from megakd.data.store import reader
from megakd.models import clip, streaming
from megakd.models.clip import ModelSpec
from megakd.models.fingerprint import preprocessing
from megakd.models.patches import image_size
from megakd.recipe import Recipe, Student, Teacher
from megakd.recipe import load as recipes
from megakd.recipe.placements import MODES
from megakd.recipe.resume import change
from megakd.runtime import launch
from megakd.runtime.launch import World
from megakd.teachers.build import load
from megakd.teachers.embed import EmbedJob
from megakd.teachers.embed_request import EmbedRequest
from support import image_teachers  # noqa: F401  (registers the models)
from support.runs import megakd, ran, train
from support.teachers import KINDS, TEXT, timm_tower

SIZED = {"embed_dim": 48, "vision_cfg": timm_tower("megakd_sized_patch16_32", "map", "none", 32), "text_cfg": TEXT}
_KINDS = ("ViT-bigG", "CoCa", "PE-Core", "EVA02-E", "SigLIP", "ConvNeXt", "MobileCLIP", "Swin")
NAMED = {**{kind: KINDS[kind] for kind in _KINDS}, "SizedViT": SIZED, "RN": KINDS["ResNet"]}
HERE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def names(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The narrow architectures under names of open_clip's own table."""
    folder = tmp_path_factory.mktemp("configurations")
    for name, config in NAMED.items():
        (folder / f"megakd-{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)


def specification(settings: Teacher | Student, role: str = "teacher") -> ModelSpec:
    config, preprocess = clip.configuration(settings, role)
    return ModelSpec(role, settings, config, preprocess, lambda texts: torch.zeros(len(texts), 1, dtype=torch.long))


def weights_of(name: str, folder: Path) -> Path:
    """A file of the named model at its own size."""
    torch.manual_seed(5)
    model = open_clip.create_model(f"megakd-{name}")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # open_clip leaves some of CoCa's as the memory was, which may hold any number
                parameter.zero_()
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def pixels(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "size"),
    [("ViT-bigG", (64, 64)), ("ViT-bigG", (32, 80)), ("CoCa", (64, 64)), ("PE-Core", (64, 96)), ("EVA02-E", (64, 64)), ("SigLIP", (80, 64)),
     ("ConvNeXt", (96, 64)), ("MobileCLIP", (96, 64))],
)  # fmt: skip
def test_a_named_model_is_that_of_open_clips_force_image_size_bit_for_bit(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    file = weights_of(name, tmp_path)
    theirs: Any = open_clip.create_model(f"megakd-{name}", pretrained=str(file), force_image_size=size).eval()
    description = specification(Teacher(model=f"megakd-{name}", pretrained=str(file), image_size=list(size)))
    assert preprocessing(description).size == size
    for built in (clip.build(description, HERE.device), streaming.load(description, HERE, "fp32")):
        ours: Any = built.clip.eval()
        assert image_size(ours.visual) == size
        state = ours.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
        with torch.no_grad():
            torch.testing.assert_close(ours.encode_image(pixels(*size)), theirs.encode_image(pixels(*size)), rtol=0, atol=1e-5)


def test_a_resnets_pooling_has_its_positions_interpolated_as_a_vits_are(tmp_path: Path) -> None:
    """open_clip's own loading fails there: it leaves them at their size."""
    file = weights_of("RN", tmp_path)
    with pytest.raises(RuntimeError, match="positional_embedding"):
        open_clip.create_model("megakd-RN", pretrained=str(file), force_image_size=128)
    built: Any = clip.build(specification(Teacher(model="megakd-RN", pretrained=str(file), image_size=128)), HERE.device).clip
    state = {"visual.positional_embedding": load_file(file)["visual.attnpool.positional_embedding"]}
    vit = open_clip.create_model("megakd-ViT-bigG", force_image_size=64)  # of 4 x 4 patches, as this ResNet's last stage
    resize_pos_embed(state, vit)
    assert built.visual.attnpool.positional_embedding.shape[0] == 17
    assert torch.equal(built.visual.attnpool.positional_embedding, state["visual.positional_embedding"])
    assert built.encode_image(pixels(128, 128)).shape == (2, 32)


@pytest.fixture
def alone() -> Iterator[World]:
    yield launch.start()
    launch.stop()


@pytest.mark.parametrize("name", ["ViT-bigG", "SigLIP", "PE-Core"])
def test_every_placement_has_the_same_teacher(name: str, alone: World, tmp_path: Path) -> None:
    file, size = weights_of(name, tmp_path), (64, 64)
    theirs: Any = open_clip.create_model(f"megakd-{name}", pretrained=str(file), force_image_size=size).eval()
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(theirs.encode_image(pixels(*size)), dim=-1)
    for mode in MODES:
        description = specification(Teacher(model=f"megakd-{name}", pretrained=str(file), image_size=64, mode=mode))
        teacher = load(description, alone, streaming.Int8() if mode.endswith("int8") else None)
        found, features = teacher.see(pixels(*size), [-1])
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.03 if mode.endswith("int8") else 1e-6)
        assert features["patches.-1"].shape[1:3] == (4, 4)


def test_a_students_timm_tower_takes_the_name_of_its_size_so_that_open_clip_loads_it_again() -> None:
    teacher, student = ({"model": "megakd-SizedViT", "pretrained": "random", "image_size": size} for size in (48, 64))
    config, _ = clip.configuration(Student(**student), "student")
    assert config["vision_cfg"]["timm_model_name"] == "megakd_sized_patch16_64"
    assert clip.configuration(Teacher(**teacher), "teacher")[0]["vision_cfg"]["timm_model_name"] == "megakd_sized_patch16_32"
    with pytest.raises(ValueError, match=r"student\.image_size = \[48, 48\]: .* take a size that timm has a name for \(32, 64\)"):
        clip.configuration(Student(**teacher), "student")


REFUSED = [
    ({"model": "ViT-B-16", "image_size": 225}, r"image_size = \[225, 225\]: .* sizes that are: \[224, 224\] and \[240, 240\]"),
    ({"model": "ViT-B-16", "image_size": [8, 32]}, r"whole patches of 16 x 16; the nearest sizes that are: \[16, 32\]$"),
    ({"model": "RN50", "image_size": 250}, r"image_size = \[250, 250\]: .* \[224, 224\] and \[256, 256\]"),
    ({"model": "RN50", "image_size": [256, 224]}, r"ResNet takes squares alone; give one number, such as 256"),
    ({"model": "megakd-ConvNeXt", "image_size": 100}, r"image_size = \[100, 100\]: .* \[96, 96\] and \[128, 128\]"),
    ({"model": "megakd-SigLIP", "image_size": 50}, r"image_size = \[50, 50\]: .* \[48, 48\] and \[64, 64\]"),
    ({"model": "megakd-Swin", "image_size": 96}, r"image_size = \[96, 96\]: .* timm's SwinTransformer has positions of one size"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_a_size_that_the_tower_cannot_take_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip.configuration(Teacher(pretrained="random", **given), "teacher")


def test_an_architecture_has_its_size_itself_and_the_own_size_changes_nothing() -> None:
    with pytest.raises(ValueError, match=r"image_size = \[64, 64\] is for named models; write it as architecture\.vision_cfg\.image_size"):
        Student(architecture=copy.deepcopy(SIZED), image_size=64)
    own, same = (clip.configuration(Student(model="ViT-B-32", **more), "student") for more in ({}, {"image_size": 224}))
    assert own == same
    assert change("student.image_size") == change("teacher.image_size") == "refused"


def test_a_store_says_the_size_and_is_refused_by_another(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    file = weights_of("ViT-bigG", tmp_path)
    asked = (
        *("teacher.model=megakd-ViT-bigG", f"teacher.pretrained={file}", f"teacher.tokenizer={world}/tokenizer", "objectives.feature=1"),
        "teacher.image_size=32",
    )
    recipe, _ = recipes.load(str(recipe_file), asked)
    EmbedJob(recipe, EmbedRequest(tmp_path / "store", 1, "fp32"), HERE, part=64).embed()
    key = reader.read_manifest(tmp_path / "store").key
    assert (key["teacher"]["vision_cfg"]["image_size"], key["preprocess"]["size"]) == (32, [32, 32])
    sets = (*asked, f"teacher.store={tmp_path / 'store'}")
    assert train(recipe_file, "--dry_run", sets=sets).code == 0
    other = train(recipe_file, "--dry_run", sets=(*sets, "teacher.image_size=64"))
    assert other.code == 2
    assert "image_size" in other.err, other.err


@pytest.mark.parametrize("name", ["ViT-bigG", "SizedViT"])
def test_a_student_of_that_size_is_trained_exported_loaded_again_and_scored(
    name: str, recipe_file: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "named.toml"
    own = recipe_file.read_text().split("[student.architecture]")
    table = own[1].split("[objectives]")[1]
    file = weights_of(name, tmp_path)
    named = f'model = "megakd-{name}"\npretrained = "{file}"\nimage_size = 64\n\n[objectives]'
    recipe.write_text(own[0] + named + table, encoding="utf-8")
    scored = f"evaluation.retrieval.test={world}/test/*.tar"
    shown = train(recipe, "--dry_run", sets=(scored,))
    assert shown.code == 0, shown.err
    assert "(3, 64, 64)" in shown.out
    run = ran(recipe, tmp_path / "run", scored, "optim.steps=2", "optim.warmup=0")
    written = json.loads((run / "model" / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]
    assert written["image_size"] == 64
    loaded: Any = open_clip.create_model(f"local-dir:{run / 'model'}").eval()
    ours: Any = clip.build(clip.resolve(Teacher(model=f"local-dir:{run / 'model'}"), "teacher"), HERE.device).clip.eval()
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels(64, 64)), ours.encode_image(pixels(64, 64)))
    scores = {}
    for size in (None, 64):
        out = tmp_path / f"{size}.json"
        flags = ("--image_size", size) if size else ()
        source = ("--model", f"megakd-{name}", "--pretrained", file, "--tokenizer", world / "tokenizer")
        assert megakd("evaluate", *source, *flags, "--set", scored, "--set", "data.workers=0", "--out", out) == 0
        scores[size] = json.loads(out.read_text())
    assert scores[64]["image_size"] == [64, 64]
    assert "image_size" not in scores[None]
    assert scores[64]["retrieval"] != scores[None]["retrieval"]
    assert Recipe.model_validate(json.loads((run / "run.json").read_text())["recipe"], strict=False).student.image_size == (64, 64)  # type: ignore[union-attr]
