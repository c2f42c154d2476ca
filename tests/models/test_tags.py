"""What weights were trained with, activation and preprocessing, holds for them as a tag and as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.factory import get_model_config
from open_clip.pretrained import get_pretrained_cfg, list_pretrained
from open_clip.transform import PreprocessCfg

from megakd.models import clip, preprocessing
from megakd.models.fingerprint import preprocessing as of_identity
from megakd.models.preprocessing import KEYS
from megakd.models.pretrained import check_activation
from megakd.recipe import Model, Preprocess, Teacher

PAIRS = list_pretrained()
DIFFERENT = [
    pair for pair in PAIRS if bool(get_model_config(pair[0]).get("quick_gelu")) != bool(get_pretrained_cfg(*pair).get("quick_gelu"))
]
AMBIGUOUS = ("ViT-L-14", "ViT-H-14", "ViT-H-14-quickgelu")
DEFAULT = {key: getattr(PreprocessCfg(), key) for key in KEYS}


def _of_tag(name: str, tag: str) -> dict[str, Any]:
    return {key: get_pretrained_cfg(name, tag)[key] for key in KEYS}


def _chosen(name: str, pretrained: str, **more: Any) -> dict[str, Any]:
    """What `configuration` takes, complete."""
    config, preprocess = clip.configuration(Teacher(model=name, pretrained=pretrained, **more), "teacher")
    found = preprocessing.complete(preprocess, config)
    return {key: getattr(found, key) for key in KEYS}


def test_open_clip_has_28_pairs_of_name_and_tag_with_different_activations() -> None:
    assert len(DIFFERENT) == 28
    plain = {name for name, tag in PAIRS if tag == "openai" and "quickgelu" not in name}
    assert {name for name, tag in DIFFERENT if tag == "openai"} == plain


@pytest.mark.parametrize(("name", "tag"), DIFFERENT)
def test_a_tag_of_another_activation_is_refused_with_the_name_that_has_it(name: str, tag: str) -> None:
    config = get_model_config(name)
    with pytest.raises(ValueError, match="GELU") as raised:
        check_activation(Model(model=name, pretrained=tag), config, "teacher")
    message = str(raised.value)
    if "hf-hub:" in message:  # one model has no twin, and its repository brings its configuration
        assert name == "roberta-ViT-B-32"
        return
    remedy = message.partition("teacher.model = '")[2].partition("'")[0]
    assert bool(get_model_config(remedy).get("quick_gelu")) == bool(get_pretrained_cfg(name, tag).get("quick_gelu"))
    check_activation(Model(model=remedy, pretrained=tag), get_model_config(remedy), "teacher")
    assert get_pretrained_cfg(remedy, tag)


def test_the_other_168_pairs_are_taken() -> None:
    for name, tag in PAIRS:
        if (name, tag) not in DIFFERENT:
            check_activation(Model(model=name, pretrained=tag), get_model_config(name), "teacher")


def test_describe_refuses_it_before_any_load() -> None:
    with pytest.raises(ValueError, match=r"set teacher\.model = 'ViT-B-32-quickgelu'"):
        clip.resolve(Teacher(model="ViT-B-32", pretrained="openai"), "teacher")
    with pytest.raises(ValueError, match=r"set student\.model = 'RN50-quickgelu'"):
        clip.resolve(Model(model="RN50", pretrained="openai"), "student")


@pytest.mark.parametrize(
    ("model", "file", "right"),
    [
        ("ViT-B-32", "ViT-B-32-openai.safetensors", "ViT-B-32-quickgelu"),
        ("ViT-B-32", "vit_b_32-quickgelu-laion400m_e32-46683a32.pt", "ViT-B-32-quickgelu"),
        ("ViT-B-32", "models--timm--vit_base_patch32_clip_224.openai/snapshots/1/open_clip_model.safetensors", "ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k.safetensors", "ViT-B-32"),
        ("ViT-L-14", "metaclip-400m.bin", "ViT-L-14-quickgelu"),
    ],
)
def test_a_file_that_tells_its_tag_by_its_name_is_held_to_it(model: str, file: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"set teacher.model = '{right}'.*rename the file"):
        check_activation(Model(model=model, pretrained=f"/weights/{file}"), get_model_config(model), "teacher")
    check_activation(Model(model=right, pretrained=f"/weights/{file}"), get_model_config(right), "teacher")


def test_a_tag_that_only_the_twin_has_is_pointed_out() -> None:
    with pytest.raises(ValueError, match=r"trained with GELU.*set teacher\.model = 'ViT-B-32'$"):
        clip.resolve(Teacher(model="ViT-B-32-quickgelu", pretrained="laion2b_s34b_b79k"), "teacher")


def test_58_tags_have_another_preprocessing_than_the_default() -> None:
    assert sum(_of_tag(*pair) != DEFAULT for pair in PAIRS) == 58


def test_a_file_gets_the_preprocessing_of_its_tags_where_they_agree_and_is_refused_where_not() -> None:
    """Never the default without a word, which is what 58 pairs got."""
    for name, tag in PAIRS:
        if name in AMBIGUOUS:
            with pytest.raises(ValueError, match=r"set teacher\.preprocess to the tag"):
                _chosen(name, "/weights/mine.safetensors")
            assert _chosen(name, "/weights/mine.safetensors", preprocess=tag) == _of_tag(name, tag)
        else:
            assert _chosen(name, "/weights/mine.safetensors") == _of_tag(name, tag), (name, tag)


def test_a_file_gets_the_preprocessing_of_the_tag_in_its_name() -> None:
    assert _chosen("ViT-H-14-quickgelu", "/weights/dfn5b.safetensors")["resize_mode"] == "squash"
    assert _chosen("ViT-L-14", "/weights/laion2b_s32b_b82k.safetensors")["mean"] == (0.5, 0.5, 0.5)


def test_a_preprocessing_that_nobody_wrote_is_said(caplog: pytest.LogCaptureFixture) -> None:
    preprocessing.assumed.cache_clear()
    _chosen("ViT-B-16-SigLIP", "/weights/mine.safetensors")
    assert [record.message for record in caplog.records] == [
        "teacher: images are prepared with mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5), interpolation bicubic, resize_mode squash, "
        "from all tags of ViT-B-16-SigLIP"
    ]
    caplog.clear()
    _chosen("ViT-B-16-SigLIP", "/weights/mine.safetensors")
    assert not caplog.records, "once"


def test_the_recipes_key_comes_before_everything() -> None:
    table = Preprocess(mean=(0.1, 0.2, 0.3), resize_mode="longest")
    for name, pretrained in (("ViT-B-16-SigLIP", "webli"), ("ViT-B-16-SigLIP", "/weights/mine.pt"), ("ViT-B-32", "random")):
        found = _chosen(name, pretrained, preprocess=table)
        assert (found["mean"], found["resize_mode"]) == ((0.1, 0.2, 0.3), "longest")
        expected = DEFAULT if pretrained == "random" else _of_tag("ViT-B-16-SigLIP", "webli")
        assert (found["std"], found["interpolation"]) == (expected["std"], expected["interpolation"])
    assert _chosen("ViT-B-32", "random", preprocess="ViT-B-16-SigLIP:webli") == _of_tag("ViT-B-16-SigLIP", "webli")
    with pytest.raises(ValueError, match=r"teacher\.preprocess = 'laion3b': no pretrained tag"):
        _chosen("ViT-B-32", "random", preprocess="laion3b")


@pytest.mark.parametrize("named", [True, False])
def test_built_model_identity_and_recipe_agree_about_the_preprocessing(named: bool, tmp_path: Path) -> None:
    source: dict[str, Any] = {"model": "ViT-B-32-256", "pretrained": "random"}
    if not named:
        source = {"architecture": {**get_model_config("ViT-B-32-256"), "preprocess_cfg": {"mean": [0.0, 0.0, 0.0]}}, "pretrained": "random"}
    description = clip.resolve(Teacher(**source, preprocess=Preprocess(std=(1.0, 1.0, 2.0), interpolation="bilinear")), "teacher")
    built = clip.build(description, torch.device("meta"), load_weights=False)
    assert built.preprocess == of_identity(description)
    assert (built.preprocess.std, built.preprocess.interpolation) == ((1.0, 1.0, 2.0), "bilinear")
    assert built.preprocess.mean == ((0.0, 0.0, 0.0) if not named else open_clip.OPENAI_DATASET_MEAN)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"std": [1.0, 0.0, 1.0]}, "std"),
        ({"mean": [1.0]}, "mean"),
        ({"interpolation": "lanczos"}, "interpolation"),
        ({"resize_mode": 3}, "resize_mode"),
    ],
)
def test_a_stored_preprocessing_that_no_images_can_have_is_refused(table: dict[str, Any], told: str) -> None:
    architecture = {**get_model_config("ViT-B-32"), "preprocess_cfg": table}
    with pytest.raises(ValueError, match=f"student: preprocess_cfg.{told} = "):
        clip.configuration(Model(architecture=architecture), "student")
