"""The tables from other programs' flags: complete, and true of the recipe's keys."""

from __future__ import annotations

import inspect
import re

import open_clip_train.params
import pytest

from megakd.recipe import Recipe
from megakd.runtime import ds_sections
from megakd.training import command
from support import REPOSITORY
from support.recipe_keys import leaves

PAGE = (REPOSITORY / "megakd" / "recipe" / "COMING_FROM.md").read_text(encoding="utf-8")
# of LLaVA's scripts/v1_5/pretrain.sh (c8f3b6a), finetune.sh (5a5bda8) and finetune_lora.sh (e523827)
LLAVA = """
deepspeed model_name_or_path version data_path image_folder vision_tower mm_projector_type tune_mm_mlp_adapter pretrain_mm_mlp_adapter
mm_vision_select_layer mm_use_im_start_end mm_use_im_patch_token image_aspect_ratio group_by_modality_length bf16 output_dir
num_train_epochs per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps evaluation_strategy save_strategy
save_steps save_total_limit learning_rate weight_decay warmup_ratio lr_scheduler_type logging_steps tf32 model_max_length
gradient_checkpointing dataloader_num_workers lazy_preprocess report_to lora_enable lora_r lora_alpha mm_projector_lr
"""


def _rows(heading: str) -> list[tuple[str, str]]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [(first, second) for first, second in cells]


OPEN_CLIP, LLAVAS = _rows("From open_clip's flags to a recipe"), _rows("From LLaVA's scripts to a recipe")


def _flags(rows: list[tuple[str, str]]) -> list[str]:
    return [flag for first, _ in rows for flag in re.findall(r"`(--[\w-]+)`", first)]


def test_every_flag_of_the_installed_open_clip_is_in_the_table_once() -> None:
    there = re.findall(r"""add_argument\(\s*["'](--[a-z0-9-]+)["']""", inspect.getsource(open_clip_train.params))
    assert sorted(_flags(OPEN_CLIP)) == sorted(there)
    assert f"all {len(there)}." in PAGE


def test_every_flag_of_llavas_scripts_is_in_the_table_once() -> None:
    assert sorted(_flags(LLAVAS)) == sorted(f"--{name}" for name in LLAVA.split())


@pytest.mark.parametrize(("flags", "here"), [*OPEN_CLIP, *LLAVAS])
def test_what_stands_beside_a_flag_exists(flags: str, here: str) -> None:
    keys = {name for name, _ in leaves(Recipe)}
    known = keys | {part for name in keys for part in (".".join(name.split(".")[:end]) for end in range(1, name.count(".") + 1))}
    ours = set(re.findall(r"--\w+", command.parser().format_help()))
    architecture = {"quick_gelu", "custom_text", "vision_cfg.patch_dropout", "text_cfg.context_length", "vision_cfg.image_size"}
    json = {*ds_sections.SHARED, *ds_sections.SCALARS, *ds_sections.SECTIONS}
    json |= {f"{section}.{key}" for section, names in ds_sections.SECTIONS.items() for key in names}
    named = re.findall(r"`([^`]+)`", here)
    assert [name for name in named if name not in known | ours | architecture | json] == []
    assert named or "none" in here
