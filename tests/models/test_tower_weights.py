"""One tower's weights from elsewhere: files of several programs, timm's and transformers' own; the rest is drawn as without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from megakd.models import clip
from megakd.models.clip import ClipModel
from megakd.models.start.sources import start_of
from support.starts import ALONE, LARGE, SMALL, TEXT, VISION, begun, built, described, drawn, recipe, saved, with_values

TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
TIMM_STUDENT: dict[str, Any] = {"embed_dim": 16, "vision_cfg": TIMM, "text_cfg": TEXT}


@pytest.fixture(scope="module")
def large(tokenizer: Path) -> ClipModel:
    return built(LARGE, tokenizer)


def _student(tokenizer: Path, architecture: dict[str, Any] = LARGE, **keys: str) -> dict[str, Any]:
    return {"architecture": architecture, "tokenizer": str(tokenizer), **keys}


def _tower(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value.clone() for name, value in model.state_dict().items() if name.startswith(prefix)}


def _image_tower_of(model: Any, path: Path, kind: str) -> str:
    if kind == "a CLIP":
        return saved(model, path)
    if kind == "a training program's":
        torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, path.with_suffix(".pt"))
        return str(path.with_suffix(".pt"))
    save_file(_tower(model, "visual."), path)
    return str(path)


@pytest.mark.parametrize("kind", ["a CLIP", "a training program's", "the tower alone"])
def test_an_image_tower_comes_from_a_file_and_the_rest_is_drawn_as_without(
    kind: str, large: ClipModel, tokenizer: Path, tmp_path: Path
) -> None:
    file = _image_tower_of(large.clip, tmp_path / "weights.safetensors", kind)
    student, start = begun(_student(tokenizer, image_weights=file), seed=7)
    source, random = large.clip.state_dict(), drawn(_student(tokenizer), seed=7)
    for name, value in student.state_dict().items():
        assert torch.equal(value, (source if name.startswith("visual.") else random)[name]), name
    assert start.describe() == [
        f"student begins with: image tower: 68 tensors from {file} (student.image_weights); text tower: all 53 new; "
        "the rest: 1 new (logit_scale)"
    ]


@pytest.mark.parametrize("custom", [False, True], ids=["open_clip's older class", "its newer"])
def test_a_text_tower_comes_from_a_file_of_either_class(custom: bool, large: ClipModel, tokenizer: Path, tmp_path: Path) -> None:
    file = saved(large.clip, tmp_path / "weights.safetensors")
    architecture = {**LARGE, "custom_text": True} if custom else LARGE
    student, start = begun(_student(tokenizer, architecture, text_weights=file))
    tokens = large.description.tokenize(["a red square", "two circles"])
    with torch.no_grad():
        assert torch.equal(student.encode_text(tokens), large.clip.encode_text(tokens))
    assert "image tower: all 68 new; text tower: 53 tensors from" in start.describe()[0]


def test_a_projection_to_another_width_stays_new_and_is_named(large: ClipModel, tokenizer: Path, tmp_path: Path) -> None:
    file = saved(large.clip, tmp_path / "weights.safetensors")
    narrow = {**LARGE, "embed_dim": 16}
    student, start = begun(_student(tokenizer, narrow, image_weights=file, text_weights=file), seed=2)
    random = drawn(_student(tokenizer, narrow), seed=2)
    assert torch.equal(student.visual.proj, random["visual.proj"])
    assert torch.equal(student.text_projection, random["text_projection"])
    assert torch.equal(student.visual.conv1.weight, large.clip.visual.conv1.weight)  # type: ignore[union-attr, arg-type]
    line = start.describe()[0]
    assert f"image tower: 67 tensors from {file} (student.image_weights), 1 new (visual.proj);" in line
    assert f"text tower: 52 tensors from {file} (student.text_weights), 1 new (text_projection);" in line
    assert start.record()["text tower"]["new"] == ["text_projection"]


def test_positions_of_another_resolution_are_interpolated_and_it_is_said(large: ClipModel, tokenizer: Path, tmp_path: Path) -> None:
    file = saved(large.clip, tmp_path / "weights.safetensors")
    _, start = begun(_student(tokenizer, {**LARGE, "vision_cfg": {**VISION, "image_size": 48}}, image_weights=file))
    assert start.describe()[1].endswith("visual.positional_embedding interpolated to 37 positions")


def test_an_image_tower_of_transformers_clip_comes_under_its_names(tokenizer: Path, tmp_path: Path) -> None:
    towers = {
        "vision_config": {"hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 192, "image_size": 32},
        "text_config": {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 192, "vocab_size": 50},
    }
    towers["vision_config"] |= {"patch_size": 8, "hidden_act": "gelu"}
    towers["text_config"] |= {"hidden_act": "gelu", "bos_token_id": 1, "eos_token_id": 2}
    theirs: Any = with_values(transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=24)))
    theirs.save_pretrained(tmp_path)
    student, _ = begun(_student(tokenizer, image_weights=str(tmp_path / "model.safetensors")))
    pixels = torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32).sin()
    with torch.no_grad():
        found = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)
        assert torch.allclose(student.encode_image(pixels), found, atol=1e-4)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's copy of timm/test_vit.r160_in1k without a network; its trunk's weights are the file's but for the classifier."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee", encoding="utf-8")
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    file = repository / "snapshots" / "c0ffee" / "model.safetensors"
    saved(with_values(timm.create_model("test_vit")), file)
    return file


@pytest.mark.parametrize("named", ["timm", "r160_in1k"])
def test_timms_own_weights_come_through_open_clip(named: str, hub: Path, tokenizer: Path) -> None:
    student, start = begun(_student(tokenizer, TIMM_STUDENT, image_weights=named), seed=4)
    state, random = student.state_dict(), drawn(_student(tokenizer, TIMM_STUDENT), seed=4)
    source = load_file(hub)
    trunk = [name for name in state if name.startswith("visual.trunk.")]
    assert all(torch.equal(state[name], source[name.removeprefix("visual.trunk.")]) for name in trunk)
    assert all(torch.equal(state[name], random[name]) for name in state if name not in trunk)
    assert start.describe() == [
        f"student begins with: image tower: {len(trunk)} tensors from timm:test_vit r160_in1k (student.image_weights), "
        "1 new (visual.head.proj.weight); text tower: all 53 new; the rest: 1 new (logit_scale)",
        f"student.image_weights = {named!r}: trained on images of mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5), other than the student's: "
        "student.preprocess gives it the same",
    ]


def test_the_same_weights_come_from_timms_file(hub: Path, tokenizer: Path) -> None:
    from_library, _ = begun(_student(tokenizer, TIMM_STUDENT, image_weights="timm"))
    from_file, start = begun(_student(tokenizer, TIMM_STUDENT, image_weights=str(hub)))
    one, other = from_library.state_dict(), from_file.state_dict()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert "1 new (visual.head.proj.weight)" in start.describe()[0]


def test_weights_that_are_not_here_are_said_before_the_run_and_their_absence_is_one_message(hub: Path, tokenizer: Path) -> None:
    hub.unlink()
    wanted = recipe(_student(tokenizer, TIMM_STUDENT, image_weights="timm"))
    assert wanted.student is not None
    start = start_of(wanted, clip.resolve(wanted.student, "student"))
    start.look()
    assert "image tower: from timm:test_vit r160_in1k (student.image_weights), which is not on this machine yet;" in start.describe()[0]
    with pytest.raises(
        ValueError, match=r"^student.image_weights = 'timm': no weights of timm:test_vit r160_in1k came .*check the network$"
    ):
        described(_student(tokenizer, TIMM_STUDENT, image_weights="timm"))


@pytest.fixture
def bert(tokenizer: Path, tmp_path: Path) -> Any:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 128}
    model: Any = with_values(transformers.BertModel(transformers.BertConfig(**shape, max_position_embeddings=64)))
    model.save_pretrained(tmp_path / "bert")
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "bert")
    return model


def _with_bert(tmp_path: Path, pooler: str) -> dict[str, Any]:
    folder = str(tmp_path / "bert")
    words = {"hf_model_name": folder, "hf_tokenizer_name": folder, "hf_pooler_type": pooler, "hf_proj_type": "linear", "context_length": 32}
    return {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": {**words, "vocab_size": 128}}


def test_a_text_tower_of_transformers_has_its_own_weights(bert: Any, tokenizer: Path, tmp_path: Path) -> None:
    student, start = begun(_student(tokenizer, _with_bert(tmp_path, "mean_pooler"), text_weights="transformers"))
    source, state = bert.state_dict(), student.state_dict()
    inside = [name for name in state if name.startswith("text.transformer.")]
    assert all(torch.equal(state[name], source[name.removeprefix("text.transformer.")]) for name in inside)
    assert (
        f"text tower: {len(inside)} tensors from {tmp_path / 'bert'} (student.text_weights), 1 new (text.proj.weight)"
        in start.describe()[0]
    )


def test_a_text_tower_of_transformers_comes_from_its_file_too(bert: Any, tokenizer: Path, tmp_path: Path) -> None:
    named = _student(tokenizer, _with_bert(tmp_path, "cls_pooler"), text_weights="transformers")
    one, other = (begun(keys)[0].state_dict() for keys in (named, {**named, "text_weights": str(tmp_path / "bert" / "model.safetensors")}))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_what_transformers_would_draw_with_a_warning_is_refused(bert: Any, tokenizer: Path, tmp_path: Path) -> None:
    shortened = {name: value.clone() for name, value in bert.state_dict().items() if not name.startswith("pooler.")}
    save_file(shortened, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    keys = _student(tokenizer, _with_bert(tmp_path, "cls_pooler"), text_weights="transformers")
    with pytest.raises(ValueError, match=r"student.text_weights = 'transformers': .* has no pooler.dense.bias, pooler.dense.weight"):
        begun(keys)


def test_a_folder_of_transformers_without_weights_is_refused(bert: Any, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "bert" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"student.text_weights = 'transformers': .* is a folder without weights"):
        described(_student(tokenizer, _with_bert(tmp_path, "mean_pooler"), text_weights="transformers"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_weights": "nothing.safetensors"}, "student.image_weights = 'nothing.safetensors': nothing.safetensors: no such file"),
        (
            {"image_weights": "timm"},
            "student.image_weights = 'timm': the image tower is open_clip's own, without vision_cfg.timm_model_name",
        ),
        ({"text_weights": "transformers"}, "student.text_weights = 'transformers': the text tower is open_clip's own, without text_cfg.hf"),
        ({"image_weights": "openai"}, "student.image_weights = 'openai': neither 'timm', a file .* nor a tag of this tower; tags: none"),
        (
            {"text_weights": "openai"},
            "student.text_weights = 'openai': neither 'transformers', a file .* nor a tag of this tower; tags: none",
        ),
    ],
)
def test_a_name_of_nothing_is_refused(keys: dict[str, str], message: str, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=message):
        described(_student(tokenizer, **keys))


def test_a_tag_of_timm_that_it_lacks_is_refused_with_those_it_has(tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"'augreg': neither 'timm', a file .* nor a tag of this tower; tags: r160_in1k"):
        described(_student(tokenizer, TIMM_STUDENT, image_weights="augreg"))


def test_a_tag_that_was_trained_with_another_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"student\.image_weights = 'openai': this tag was trained with QuickGELU"):
        described({"model": "ViT-B-32", "image_weights": "openai"})


def test_the_weights_of_another_tower_are_refused_with_what_differs(large: ClipModel, tokenizer: Path, tmp_path: Path) -> None:
    file = saved(large.clip, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"student.image_weights = .*: these are not the weights of this architecture. not of this model"):
        described(_student(tokenizer, SMALL, image_weights=file))
    save_file(_tower(large.clip, "visual."), tmp_path / "image.safetensors")
    with pytest.raises(ValueError, match=r"student.text_weights = .*missing: .*token_embedding.weight"):
        described(_student(tokenizer, text_weights=str(tmp_path / "image.safetensors")))


def test_what_a_checkpoint_holds_is_not_read(large: ClipModel, tokenizer: Path, tmp_path: Path) -> None:
    file = saved(large.clip, tmp_path / "weights.safetensors")
    _, start = described(_student(tokenizer, image_weights=file))
    state = drawn(_student(tokenizer), seed=9)
    student, _ = begun(_student(tokenizer), seed=9)
    start.load(student, {f"clip.{name}" for name in state} - {"clip.visual.proj"}, ALONE)
    moved = [name for name, value in student.state_dict().items() if not torch.equal(value, state[name])]
    assert moved == ["visual.proj"]
