"""The DeepSpeed JSON: "auto" comes from the recipe, and a literal that disagrees is refused with both files and both values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from megakd.runtime import ds_check, ds_config, zero3
from support.runs import REPOSITORY

SHIPPED = sorted((REPOSITORY / "ds_configs").glob("*.json"))


def _zero(stage: object, **more: object) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    """Batch 16, clipping at 1, AdamW with 1e-3."""
    return recipes.load(str(recipe_file))[0]


def _resolve(config: dict[str, Any], recipe: Recipe, ranks: int = 2) -> dict[str, Any]:
    return ds_config.resolve(config, recipe, ranks, config_name="z.json", recipe_name="r.toml")


def _error(config: dict[str, Any], recipe: Recipe, ranks: int = 2) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (each test looks at the message)
        _resolve(config, recipe, ranks)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_json_resolves_to_a_config_without_auto(path: Path, recipe: Recipe) -> None:
    config, name = ds_config.read(str(path), "fp32")
    resolved = ds_config.resolve(config, recipe, 2, config_name=name, recipe_name="r.toml")
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 16
    assert resolved["train_micro_batch_size_per_gpu"] == 8
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["gradient_clipping"] == 1.0


def test_the_issues_five_configurations_are_there() -> None:
    assert {path.stem for path in SHIPPED} >= {"smoke_cpu", "zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_offload_bf16"}


def test_absent_keys_are_filled_like_auto_and_the_input_stays_as_it_was(recipe: Recipe) -> None:
    config: dict[str, Any] = _zero(1)
    resolved = _resolve(config, recipe)
    assert (resolved["train_batch_size"], resolved["train_micro_batch_size_per_gpu"]) == (16, 8)
    assert config == _zero(1)


@pytest.mark.parametrize(
    ("config", "accumulation"),
    [
        ({"train_micro_batch_size_per_gpu": 2}, 4),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}, 4),
        ({"gradient_accumulation_steps": 8}, 8),
    ],
)
def test_a_literal_micro_batch_or_accumulation_gives_the_other(config: dict[str, Any], accumulation: int, recipe: Recipe) -> None:
    resolved = _resolve(config, recipe)
    assert resolved["gradient_accumulation_steps"] == accumulation
    assert resolved["train_micro_batch_size_per_gpu"] == 8 // accumulation


BF16 = {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 2}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_micro_batches_of_a_run_in_bf16_add_up_in_float32(stage: int, recipe: Recipe) -> None:
    resolved = _resolve({**BF16, "zero_optimization": {"stage": stage}}, recipe)
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolved.get("communication_data_type") == ("fp32" if stage == 1 else None)
    assert not resolved.accumulates_in_bf16


def test_a_run_without_accumulation_or_in_float32_needs_no_second_type(recipe: Recipe) -> None:
    whole = {**BF16, "train_micro_batch_size_per_gpu": "auto"}
    for config in ({**whole, "zero_optimization": {"stage": 1}}, {"train_micro_batch_size_per_gpu": 2}):
        assert "data_types" not in _resolve(config, recipe)


def test_a_json_may_save_the_memory_of_float32_sums_and_no_other_type_is_taken(recipe: Recipe) -> None:
    config = {**BF16, "zero_optimization": {"stage": 2}}
    assert _resolve({**config, "data_types": {"grad_accum_dtype": "bf16"}}, recipe).accumulates_in_bf16
    assert "data_types.grad_accum_dtype = 'fp16'" in _error({**config, "data_types": {"grad_accum_dtype": "fp16"}}, recipe)


FOURS = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}


def test_literals_that_agree_are_taken(recipe: Recipe) -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.98], "eps": "auto", "weight_decay": 0.2}}
    resolved = _resolve({"train_batch_size": 16, "gradient_clipping": 1, "optimizer": optimizer}, recipe)
    assert "optimizer" not in resolved


@pytest.mark.parametrize(
    ("config", "key", "value", "owner", "own"),
    [
        ({"train_batch_size": 32}, "train_batch_size", 32, "optim.batch", 16),
        ({"gradient_clipping": 0.5}, "gradient_clipping", 0.5, "optim.clip", 1.0),
        ({"optimizer": {"params": {"lr": 0.5}}}, "optimizer.params.lr", 0.5, "optim.lr", 0.001),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, "optimizer.params.betas", [0.9, 0.999], "optim.betas", [0.9, 0.98]),
        ({"optimizer": {"params": {"weight_decay": 0}}}, "optimizer.params.weight_decay", 0, "optim.weight_decay", 0.2),
        (FOURS, "gradient_accumulation_steps", 4, "optim.batch / (micro-batch * ranks)", 2),
    ],
)
def test_a_literal_that_disagrees_names_both_files_and_both_values(
    config: dict[str, Any], key: str, value: object, owner: str, own: object, recipe: Recipe
) -> None:
    message = _error(config, recipe)
    assert f"{key} = {value!r} in z.json disagrees with {owner} = {own!r} in r.toml" in message
    assert '"auto"' in message


def test_a_batch_that_does_not_divide_over_the_ranks_names_the_nearest_that_do(recipe: Recipe) -> None:
    message = _error({}, recipe, ranks=3)
    assert "optim.batch = 16 in r.toml does not divide over 3 ranks" in message
    assert "15 or 18" in message


@pytest.mark.parametrize(
    "config",
    [
        {"train_micro_batch_size_per_gpu": 3},
        {"gradient_accumulation_steps": 3},
        {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2},  # 2 does divide the share
    ],
)
def test_a_share_that_does_not_divide_over_micro_batches_is_refused(config: dict[str, Any], recipe: Recipe) -> None:
    key = next(iter(config))
    message = _error(config, recipe)
    assert f"{key} = 3 in z.json" in message
    assert "optim.batch = 16 in r.toml over 2 ranks is 8 each" in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "optim.schedule", "remove"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "bf16"]),
        ({"bf16": {"enabled": True}}, ["bf16 without ZeRO", "1, 2 or 3"]),
        (_zero(4), ["zero_optimization.stage = 4", "0, 1, 2 or 3"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type = 'Lamb'", "AdamW"]),
        ({"optimizer": {"params": {"momentum": 0.9}}}, ["optimizer.params.momentum = 0.9", "unknown"]),
        ({"train_micro_batch_size_per_gpu": "many"}, ["train_micro_batch_size_per_gpu = 'many'"]),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps = 0"]),
    ],
)
def test_what_megakd_does_not_run_is_refused_with_key_and_remedy(config: dict[str, Any], words: list[str], recipe: Recipe) -> None:
    message = _error(config, recipe)
    assert "z.json" in message
    assert all(word in message for word in words), message


def test_a_missing_or_broken_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        ds_config.read(str(tmp_path / "none.json"), "fp32")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: not valid JSON"):
        ds_config.read(str(broken), "fp32")
    broken.write_text("[]")
    with pytest.raises(ValueError, match="an object"):
        ds_config.read(str(broken), "fp32")


def _checked(config: dict[str, Any], recipe: Recipe) -> None:
    ds_check.check(_resolve(config, recipe), "z.json")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"bf16": {"enabled": "true"}}, ["bf16.enabled = 'true'", "true or false, without quotes"]),
        ({"bf16": {"enabled": "auto"}}, ['bf16.enabled = "auto"', "remove it"]),
        ({"bf16": True}, ["bf16 = True", "a section"]),
        ({"bfloat16": {"enabled": True}}, ["bfloat16", "write bf16"]),
        (_zero("2"), ["zero_optimization.stage = '2'"]),
        (_zero(True), ["zero_optimization.stage = True"]),
        (_zero(2, overlap_com=True), ["zero_optimization.overlap_com", "did you mean 'zero_optimization.overlap_comm'"]),
        (_zero(2, reduce_bucket_size="5e8"), ["reduce_bucket_size = '5e8'", "an integer, without quotes"]),
        (_zero(2, reduce_bucket_size=10**15), ["reduce_bucket_size", "from 1 to"]),
        ({"steps_per_print": 0}, ["steps_per_print = 0", "at least 1"]),
        (_zero(1, allgather_bucket_size=100_001), ["allgather_bucket_size = 100001", "even"]),
        ({"steps_per_print": -1}, ["steps_per_print = -1", "at least 1"]),
        (_zero(1, offload_param={"device": "cpu"}), ["offload_param", "stage 3"]),
        (_zero(2, offload_optimizer={"device": "nvme"}), ["offload_optimizer.device = 'nvme'", "cpu or none"]),
        (_zero(3, mics_shard_size=8), ["mics_shard_size", "DeepSpeed has MiCS no more", "zero_hpz_partition_size"]),
        (_zero(2, zero_hpz_partition_size=2), ["zero_hpz_partition_size = 2", "the stage is 2"]),
        (_zero(3, zero_hpz_partition_size=3), ["zero_hpz_partition_size = 3", "2 ranks are no whole groups of 3"]),
        (_zero(3, zero_hpz_partition_size=2, offload_param={"device": "cpu"}), ["zero_hpz_partition_size = 2", "remove one of them"]),
        (_zero(2, cpu_offload=True), ["cpu_offload", "offload_optimizer"]),
        (_zero(3, stage3_gather_16bit_weights_on_model_save=True), ["float32", "remove it"]),
        (
            _zero(2, stage3_max_live_parameters=10**8, stage3_prefetch_bucket_size=10**7),
            ["stage3_max_live_parameters", "stage 3 alone", "stage is 2", "and stage3_prefetch_bucket_size", "stage to 3"],
        ),
        ({"data_types": {"grad_accum_dtype": "fp17"}}, ["data_types.grad_accum_dtype = 'fp17'", "write fp32"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["data_types.grad_accum_dtype = 'bf16'", "the run is in fp32"]),
        ({"zero_optimisation": {"stage": 2}}, ["zero_optimisation", "did you mean 'zero_optimization'"]),
        ({"activation_checkpointing": {"partition_activations": True}}, ["student.activation_checkpointing = true"]),
        ({"hybrid_engine": {"enabled": True}}, ["hybrid_engine", "remove"]),
        ({"elasticity": {"enabled": True}}, ["elasticity", "remove"]),
        ({"amp": {"enabled": True}}, ["amp", "bf16"]),
        ({"train_micro_batch_size_per_gpu": True}, ["train_micro_batch_size_per_gpu = True", "an integer"]),
        ({"gradient_clipping": "1.0"}, ["gradient_clipping = '1.0'", "a number"]),
        ({"optimizer": {"type": "AdamW", "params": []}}, ["optimizer.params = []", "an object"]),
        ({"comet": {"enabled": True}}, ["comet.enabled", "pip install comet_ml"]),
        ({"communication_data_type": "fp64"}, ["communication_data_type", "DeepSpeed refuses"]),
    ],
)
def test_what_deepspeed_would_fail_on_or_pass_over_is_refused_in_advance(config: dict[str, Any], words: list[str], recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"z\.json") as caught:
        _checked(config, recipe)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "config", [{"amp": {"enabled": False}}, {"fp16": {"enabled": False, "loss_scale": 0}}, {"elasticity": {"enabled": False}}]
)
def test_a_section_that_is_switched_off_asks_for_nothing(config: dict[str, Any], recipe: Recipe) -> None:
    _checked(config, recipe)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_deepspeed_itself_takes_every_shipped_json(path: Path, recipe: Recipe) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    ranks = config["zero_optimization"].get("zero_hpz_partition_size", 2)
    ds_check.check(_resolve(config, recipe, ranks), "z.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"steps_per_print": 1, "steps_per_print": 2}', "'steps_per_print' is there twice"),
        (b'{"gradient_clipping": NaN}', "gradient_clipping = nan: not a finite number"),
        (b'// mine\n{"bf16": {}}', "JSON has no comments"),
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper than 40 levels"),
        (b'{"a": "\xff"}', "byte 0xff in line 1 is not UTF-8"),
        (b'{"steps_per_print": ' + b"9" * 5000 + b"}", "an integer of thousands of digits"),
    ],
)
def test_a_json_that_no_parser_should_take_is_one_message(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "z.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"--ds_config .*z\.json") as caught:
        ds_config.read(str(tmp_path / "z.json"), "fp32")
    assert words in str(caught.value)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "z.json").write_bytes(b'\xef\xbb\xbf{"bf16": {"enabled": false}}')
    assert ds_config.read(str(tmp_path / "z.json"), "fp32")[0] == {"bf16": {"enabled": False}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "an object"),
        ('{"zero_optimization": {"stage": 2}}', "needs 3"),
        ('{"zero_optimization": {"stage": 3, "overlap_com": true}}', "did you mean 'zero_optimization.overlap_comm'"),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}', "a teacher is frozen"),
        ('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}', "teacher.mode"),
        ('{"zero_optimization": {"stage": 3}, "train_batch_size": 64}', "train_batch_size"),
        ('{"zero_optimization": {"stage": 3}, "csv_monitor": {"enabled": true}}', "the student's DeepSpeed JSON"),
    ],
)
def test_a_teachers_json_is_held_to_the_same(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=r"teacher\.ds_config = .*t\.json") as caught:
        zero3.settings(str(tmp_path / "t.json"))
    assert words in str(caught.value)
