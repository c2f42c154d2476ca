"""An architecture that cannot be is refused by its keys, before anything is built; every one of open_clip's own is taken."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.factory import get_model_config
from safetensors.torch import save_file

from megakd.models import architecture, clip
from megakd.recipe import Model
from support.teachers import ARCHITECTURES

SOUND: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def _changed(path: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(SOUND)
    *parts, key = path.split(".")
    table = found
    for part in parts:
        table = table.setdefault(part, {})
    table[key] = value
    return found


def test_all_of_open_clips_own_are_sound() -> None:
    for name in open_clip.list_models():
        architecture.check(get_model_config(name), name, written=False)
    for name, narrow in ARCHITECTURES.items():
        architecture.check(narrow, name, written=True)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("vision_cfg.layres", 2, "vision_cfg.layres: unknown key; did you mean vision_cfg.layers?"),
        ("text_cfg.pool_typ", "last", "did you mean text_cfg.pool_type?"),
        ("embed_dimension", 16, "embed_dimension: unknown key; did you mean embed_dim?"),
        ("quick_gelu", "yes", "quick_gelu"),
        ("vision_cfg.width", "32", "vision_cfg.width = '32': a whole number is needed"),
        ("vision_cfg.width", 32.0, "vision_cfg.width = 32.0: a whole number is needed"),
        ("vision_cfg.width", True, "vision_cfg.width = True: a whole number is needed"),
        ("vision_cfg.no_ln_pre", "true", "vision_cfg.no_ln_pre = 'true': true or false, without quotes, is needed"),
        ("vision_cfg.layers", 0, "vision_cfg.layers = 0: above 0"),
        ("text_cfg", None, "text_cfg: missing; an open_clip model configuration has"),
        ("vision_cfg.layers", [3, 4, 6], "vision_cfg.layers = [3, 4, 6]: a list of 4 whole numbers or a whole number"),
        ("vision_cfg.layers", 10**9, "vision_cfg.layers = 1000000000: above 0 and at most"),
        ("vision_cfg.width", 10**30, "vision_cfg.width"),
        ("vision_cfg.mlp_ratio", 10**400, "vision_cfg.mlp_ratio = 1000"),
        ("init_logit_bias", -(10**400), "init_logit_bias = -1000"),
        ("vision_cfg.head_width", 48, "vision_cfg.width = 32: no multiple of head_width = 48"),
        ("vision_cfg.patch_size", 64, "vision_cfg.patch_size = 64: larger than the image"),
        ("vision_cfg.patch_size", 12, "vision_cfg.image_size = 32: no multiple of patch_size = 12"),
        ("vision_cfg.mlp_ratio", float("nan"), "vision_cfg.mlp_ratio = nan: a finite number is needed"),
        ("vision_cfg.patch_dropout", 1.0, "vision_cfg.patch_dropout = 1.0: a fraction"),
        ("vision_cfg.pool_type", "token", "vision_cfg.pool_type = 'token': did you mean 'tok'?"),
        ("vision_cfg.timm_model_name", "vit_base_patch16_224x", "nearest: vit_base_patch16_224"),
        ("vision_cfg.norm_kwargs", {"epsilon": 1.0}, "does not give a model: TypeError"),
        ("vision_cfg.act_kwargs", [1], "vision_cfg.act_kwargs = [1]: a table is needed"),
        ("text_cfg.heads", 3, "text_cfg.width = 32: no multiple of heads = 3"),
        ("text_cfg.context_length", -1, "text_cfg.context_length = -1: above 0"),
        ("text_cfg.vocab_size", 10**12, "text_cfg.vocab_size = 1000000000000: above 0 and at most"),
        ("text_cfg.tokenizer_kwargs", {"clean": "shout"}, "its tokenizer"),
        ("text_cfg", [], "text_cfg = []: a table is needed"),
        ("vision_cfg.timm_model_pretrained", True, "a student takes its library's weights by student.image_weights = 'timm'"),
        ("text_cfg.hf_model_pretrained", True, "hf_model_pretrained = true: loads nothing; set it to false or take it out"),
        ("text_cfg.final_ln_after_pool", True, "text_cfg.final_ln_after_pool = true: open_clip's text tower does not read it"),
        ("vision_cfg.timm_pool", "map", "vision_cfg.timm_pool: has no effect without timm_model_name"),
        ("vision_cfg.output_tokens", True, "vision_cfg.output_tokens = true: is for a CoCa"),
        ("init_logit_scale", 1e6, "init_logit_scale = 1000000.0: the logarithm"),
        ("preprocess_cfg", 3, "preprocess_cfg = 3"),
    ],
)
def test_what_cannot_be_is_one_message_with_the_key(path: str, value: Any, told: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"^student") as raised:
        clip.resolve(Model(architecture=_changed(path, value)), "student")
    assert told in str(raised.value)
    assert time.process_time() - start < 20, "nothing of that size was built"


def test_several_mistakes_are_told_at_once() -> None:
    changed = _changed("vision_cfg.layers", 0)
    del changed["embed_dim"]
    changed["text_cfg"]["wdth"] = 3
    with pytest.raises(ValueError, match="embed_dim: missing") as raised:
        clip.resolve(Model(architecture=changed), "student")
    assert "vision_cfg.layers = 0" in str(raised.value)
    assert "did you mean text_cfg.width?" in str(raised.value)


def test_layers_beside_a_timm_model_have_no_effect_and_are_refused() -> None:
    name = next(iter(timm.list_models("vit_tiny*")))
    with pytest.raises(ValueError, match=r"vision_cfg\.patch_size: has no effect beside timm_model_name"):
        clip.resolve(Model(architecture=_changed("vision_cfg.timm_model_name", name)), "student")


def _folder(path: Path, text: str | bytes) -> Model:
    path.mkdir(exist_ok=True)
    (path / "open_clip_config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    save_file({"logit_scale": torch.zeros(())}, path / "open_clip_model.safetensors")
    return Model(model=f"local-dir:{path}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "nested"),
        ('{"model_cfg": ' + '{"a":' * 60 + "1" + "}" * 61, "nested"),
        ("{", "not valid JSON"),
        (b"\xff\xfe{}", "UTF-8"),
        ("", "not valid JSON"),
        ("[]", "model_cfg"),
        ("{}", "model_cfg"),
        ('{"model_cfg": []}', "model_cfg"),
        ('{"model_cfg": {"embed_dim": 16}}', "vision_cfg: missing"),
        (json.dumps({"model_cfg": _changed("vision_cfg.width", "wide")}), "vision_cfg.width = 'wide'"),
        (json.dumps({"model_cfg": SOUND, "preprocess_cfg": [1]}), "preprocess_cfg"),
        (json.dumps({"model_cfg": SOUND, "preprocess_cfg": {"mean": ["a", 1, 2]}}), "preprocess_cfg.mean"),
    ],
)
def test_a_folders_configuration_that_is_none_is_refused_by_name(text: str | bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="student") as raised:
        clip.resolve(_folder(tmp_path / "m", text), "student")
    assert told in str(raised.value)


def test_several_files_of_weights_in_a_folder_are_refused(tmp_path: Path) -> None:
    """open_clip takes the first by name, with a warning."""
    settings = _folder(tmp_path, json.dumps({"model_cfg": SOUND}))
    (tmp_path / "open_clip_model.safetensors").unlink()
    for name in ("b.safetensors", "a.bin"):
        save_file({"logit_scale": torch.zeros(())}, tmp_path / name)
    with pytest.raises(ValueError, match=r"several files of weights \(a\.bin, b\.safetensors\)"):
        clip.resolve(settings, "student")
