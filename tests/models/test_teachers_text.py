"""A student with its teacher's text tower and tokenizer: the same tokens and embeddings; what cannot be one model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.export import clip_folder
from megakd.models import clip
from megakd.models.clip import ClipModel
from megakd.recipe import Model
from support import small_towers  # noqa: F401  registers timm's models
from support.starts import LARGE, SMALL, VISION, begun, built, described, recipe

CAPTIONS = ["a red square left of a blue circle", "two green triangles", ""]
IMAGE_ALONE = {"vision_cfg": {**VISION, "width": 32, "layers": 1}}
OF_TIMM = {"timm_model_name": "megakd_small_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
KEYS = {"architecture": IMAGE_ALONE, "text_from": "teacher"}


def _exported(made: ClipModel, folder: Path) -> dict[str, Any]:
    weights = {f"clip.{name}": value for name, value in made.clip.state_dict().items()}
    clip_folder.write_model(folder, weights, made)
    return {"model": f"local-dir:{folder}"}


@pytest.fixture(scope="module")
def teacher(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A folder, as a run writes it; its tokenizer is in it."""
    return _exported(built(LARGE, tokenizer), tmp_path_factory.mktemp("teacher") / "model")


def _of(teacher: dict[str, Any]) -> Any:
    return clip.build(clip.resolve(Model(**teacher), "teacher"), torch.device("cpu"))


def _same_texts(student: Any, keys: dict[str, Any], teacher: dict[str, Any]) -> None:
    theirs = _of(teacher)
    ours, _ = described(keys, teacher=teacher)
    tokens = ours.tokenize(CAPTIONS)
    assert torch.equal(tokens, theirs.description.tokenize(CAPTIONS))
    with torch.no_grad():
        assert torch.equal(student.encode_text(tokens), theirs.clip.eval().encode_text(tokens))


def test_the_students_texts_are_the_teachers(teacher: dict[str, Any]) -> None:
    student, start = begun(KEYS, teacher=teacher)
    _same_texts(student, KEYS, teacher)
    ours, _ = described(KEYS, teacher=teacher)
    assert ours.width == 24
    assert ours.config["text_cfg"]["layers"] == 4
    assert start.describe() == [
        f"student begins with: image tower: all 20 new; text tower: 53 tensors from {teacher['model']} (student.text_from); "
        "the rest: 1 new (logit_scale)"
    ]


@pytest.mark.parametrize("quick", [False, True], ids=["GELU", "QuickGELU"])
def test_the_text_tower_of_open_clips_newer_class_goes_with_timms_image_tower(quick: bool, tokenizer: Path, tmp_path: Path) -> None:
    """Its activation as well, which timm's tower has nothing to do with."""
    text = {**LARGE["text_cfg"], "proj_bias": True, "no_causal_mask": True, "pool_type": "last"}
    made = built({**LARGE, "text_cfg": text, "custom_text": True, "quick_gelu": quick}, tokenizer)
    keys = {"architecture": {"vision_cfg": OF_TIMM}, "text_from": "teacher"}
    teacher = _exported(made, tmp_path / "model")
    student, _ = begun(keys, teacher=teacher)
    _same_texts(student, keys, teacher)


def test_a_student_of_the_newer_class_takes_the_older_ones_text_tower(teacher: dict[str, Any]) -> None:
    keys = {"architecture": {**IMAGE_ALONE, "custom_text": True}, "text_from": "teacher"}
    student, _ = begun(keys, teacher=teacher)
    _same_texts(student, keys, teacher)


def test_a_named_students_text_tower_and_width_are_the_teachers(teacher: dict[str, Any]) -> None:
    ours, start = described({"model": "ViT-B-32", "text_from": "teacher"}, teacher=teacher)
    assert ours.width == 24
    assert "text tower: 53 tensors" in start.describe()[0]


def test_the_student_inherits_its_image_tower_beside(tokenizer: Path, teacher: dict[str, Any]) -> None:
    inherit = {"model": "teacher", "towers": "image"}
    keys = {"architecture": {"vision_cfg": SMALL["vision_cfg"]}, "text_from": "teacher", "inherit": inherit}
    student, start = begun(keys, teacher=teacher)
    _same_texts(student, keys, teacher)
    source = _of(teacher).clip.state_dict()
    assert torch.equal(student.visual.proj, source["visual.proj"][:32])
    assert start.describe()[0].startswith(
        f"student begins with: image tower: 44 tensors from {teacher['model']} (student.inherit.model); text"
    )


def test_the_student_and_its_tokenizer_are_exported_and_loaded_by_open_clip(teacher: dict[str, Any], tmp_path: Path) -> None:
    student, _ = begun(KEYS, teacher=teacher)
    description, _ = described(KEYS, teacher=teacher)
    _exported(clip.ClipModel(student, description, clip.on_meta(description).preprocess), tmp_path / "student")


COCA = {**LARGE, "custom_text": True, "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 3, "output_tokens": True}}
COCA |= {"text_cfg": {**LARGE["text_cfg"], "embed_cls": True, "output_tokens": True}}
COCA |= {"multimodal_cfg": {"context_length": 32, "vocab_size": 128, "width": 48, "heads": 3, "layers": 1}}


@pytest.mark.parametrize(
    ("keys", "theirs", "message"),
    [
        ({"architecture": SMALL}, LARGE, "student.architecture.text_cfg: text_from takes the teacher's text tower in its place"),
        (
            {"architecture": {**IMAGE_ALONE, "embed_dim": 16}},
            LARGE,
            "student.architecture.embed_dim = 16: text_from takes the teacher's text tower, which embeds in width 24; take embed_dim out",
        ),
        (
            {"architecture": IMAGE_ALONE},
            {**LARGE, "quick_gelu": True},
            "the teacher's text tower has QuickGELU, the student GELU, .*: set quick_gelu = true in student.architecture",
        ),
        (
            {"architecture": {"vision_cfg": {**OF_TIMM, "timm_proj": "none"}}},
            LARGE,
            "the teacher's embeddings have width 24, and the student's image tower has no projection .*: set timm_proj = 'linear'",
        ),
        ({"architecture": IMAGE_ALONE}, COCA, "the teacher is a CoCa, whose text tower belongs to its decoder of captions"),
    ],
)
def test_what_cannot_be_one_model_is_refused(
    keys: dict[str, Any], theirs: dict[str, Any], message: str, tokenizer: Path, tmp_path: Path
) -> None:
    teacher = {"architecture": theirs, "pretrained": str(tmp_path / "none.safetensors"), "tokenizer": str(tokenizer)}
    with pytest.raises(ValueError, match=message):
        described({**keys, "text_from": "teacher"}, teacher=teacher)


TRAINED, RANDOM = {"model": "local-dir:t"}, {"model": "ViT-B-32", "pretrained": "random"}
TEXT, INHERIT = {"text_from": "teacher"}, {"inherit": {"model": "teacher"}}


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (TEXT, None, "student.text_from = 'teacher': there is no .teacher.; give the recipe one, or take text_from out"),
        (INHERIT, None, "student.inherit.model = 'teacher': there is no .teacher."),
        (TEXT, {"model": "timm:test_vit", "pretrained": "r160_in1k"}, "timm:test_vit sees images alone and has no text tower"),
        (TEXT, RANDOM, "teacher.pretrained = 'random' has no weights to take"),
        (INHERIT, RANDOM, "give it trained ones, or take inherit.model out"),
        ({**TEXT, "tokenizer": "words"}, TRAINED, "tokenizer = 'words': text_from takes the teacher's"),
        ({**TEXT, "text_weights": "x.pt"}, TRAINED, "text_weights and text_from both give the text tower's"),
        ({**TEXT, **INHERIT}, TRAINED, "inherit.towers = 'both': text_from gives the text tower's weights; set inherit.towers to 'image'"),
        ({**INHERIT, "image_weights": "x.pt"}, TRAINED, "inherit.towers = 'both': image_weights gives the image tower's; set .* to 'text'"),
        (
            {"image_weights": "x.pt", "pretrained": "a"},
            None,
            "pretrained = 'a': gives the weights of both towers, and image_weights others",
        ),
        ({**INHERIT, "pretrained": "x.pt"}, TRAINED, "pretrained = 'x.pt': .* and inherit others; take it or inherit out"),
        ({"inherit": {"model": "ViT-L-14"}}, None, "pretrained = None: there is nothing to inherit without weights; give open_clip's tag"),
        ({"inherit": {"model": "ViT-L-14", "pretrained": "random"}}, None, "pretrained = 'random': there is nothing to inherit"),
        ({"inherit": {**TRAINED, "pretrained": "x.pt"}}, None, "pretrained = 'x.pt': model = 'local-dir:t' brings its own weights"),
        ({"inherit": {"pretrained": "x.pt"}}, None, "give either `model` .a name, or 'teacher'. or `architecture` .a table., not both"),
    ],
)
def test_keys_that_give_one_tower_two_starts_are_refused_as_the_recipe_is_read(
    student: dict[str, Any], teacher: dict[str, Any] | None, message: str
) -> None:
    more = {} if teacher is None else {"teacher": teacher}
    with pytest.raises(ValueError, match=message):
        recipe({"model": "ViT-B-32", **student}, **more)


@pytest.mark.parametrize("model", ["local-dir:somewhere", "hf-hub:some/one"])
def test_a_model_that_brings_its_own_weights_needs_the_word_that_they_are_not_taken(model: str) -> None:
    with pytest.raises(ValueError, match="brings its own weights, and image_weights gives others; set pretrained = 'random' to take its"):
        recipe({"model": model, "image_weights": "x.pt"})
    assert recipe({"model": model, "image_weights": "x.pt", "pretrained": "random"}).student is not None


def test_a_student_that_another_recipe_trains_first_has_its_weights() -> None:
    with pytest.raises(
        ValueError, match="recipe = 'smoke': trains the weights that this student begins with, and image_weights gives others"
    ):
        recipe({"model": "local-dir:runs/smoke/model", "recipe": "smoke", "image_weights": "x.pt"})
