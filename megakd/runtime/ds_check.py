"""A DeepSpeed JSON tried by DeepSpeed itself, without a model, before a start."""

from __future__ import annotations

import copy
import enum
import importlib.util
import logging
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from megakd.recipe.section import union_members
from megakd.recipe.texts import shown
from megakd.runtime.ds_sections import SHARED, check_type, unknown
from megakd.runtime.engine import deepspeed

# Keys of zero_optimization that would not do here what they say: (allowed values, why).
_OWN_WEIGHTS = "weights are written by megakd, whole and in float32"
_NUMBERS = "it changes the gradients' numbers, and the curve would no longer be the recipe's"
ZERO_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "stage3_gather_16bit_weights_on_model_save": ((False,), _OWN_WEIGHTS),
    "stage3_gather_fp16_weights_on_model_save": ((False,), _OWN_WEIGHTS),
    "gather_16bit_weights_on_model_save": ((False,), _OWN_WEIGHTS),
    "elastic_checkpoint": ((False,), _OWN_WEIGHTS),
    "load_from_fp32_weights": ((True,), _OWN_WEIGHTS),
    "pipeline_loading_checkpoint": ((False,), _OWN_WEIGHTS),
    "cpu_offload": ((False,), 'an old name; write "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param": ((False,), 'an old name; write "offload_param": {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": ((False,), "an old name; write pin_memory into the offload's section"),
    "zenflow": ((), "the optimizer is the recipe's, and all of it moves in every step"),
    "zero_quantized_weights": ((False,), _NUMBERS),
    "zero_quantized_nontrainable_weights": ((False,), _NUMBERS),
    "zero_quantized_gradients": ((False,), _NUMBERS),
    "compute_grad_norm": ((True,), "every row of metrics.jsonl has the gradient's norm"),
    "ignore_unused_parameters": ((True,), "of the student not every part is in every loss"),
    "legacy_stage1": ((False,), "DeepSpeed's first stage 1 is not supported"),
    "save_muon_momentum_buffer_in_memory": ((False,), "the optimizer is AdamW"),
    "override_module_apply": ((True,), "models are built before DeepSpeed sees them"),
    "leaf_module": ((), "which modules are gathered as one is the program's to say"),
}
# What DeepSpeed had once.
GONE = ("mics_shard_size", "mics_hierarchical_params_gather")
# Buckets are allocated whole, in elements.
LARGEST_BUCKET = 4_000_000_000
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def check(config: dict[str, Any], named: str, *, frozen: bool = False) -> None:
    """Raise ValueError naming key, value, file and remedy for what DeepSpeed refuses and what megakd does not carry out.

    config: resolved, for as many ranks as there are now. frozen: a teacher's, which has no optimizer.
    """
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"zero_optimization = {shown(zero)} in {named}: a section, an object in braces, is needed here")
    if gone := next((key for key in GONE if key in zero), None):
        raise ValueError(
            f"zero_optimization.{gone} in {named}: DeepSpeed has MiCS no more; remove it. zero_hpz_partition_size keeps the backward's "
            f"gathers within groups of ranks, stage 2 keeps weights whole"
        )
    _check_model("zero_optimization", zero, deepspeed.runtime.zero.config.DeepSpeedZeroConfig, named)
    _check_zero(zero, named, frozen)
    _check_hpz(config, named, frozen)
    for section, package in MONITORS.items():
        if config.get(section, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise ValueError(f"{section}.enabled in {named}: its package is not installed: pip install {package}, or switch it off")
    every = config.get("steps_per_print")
    if isinstance(every, int) and every < 1:  # DeepSpeed divides by it in the first update
        raise ValueError(f"steps_per_print = {every} in {named}: updates between two lines of DeepSpeed, at least 1; remove it for none")
    _by_deepspeed(config, named)


def _check_zero(zero: dict[str, Any], named: str, frozen: bool) -> None:
    for key, (allowed, reason) in ZERO_REFUSED.items():
        if key in zero and zero[key] is not None and not any(zero[key] is value or zero[key] == value for value in allowed):
            raise ValueError(f"zero_optimization.{key} = {shown(zero[key])} in {named}: {reason}; remove it")
    for key in BUCKETS:
        if isinstance(zero.get(key), (int, float)) and not 1 <= zero[key] <= LARGEST_BUCKET:
            raise ValueError(f"zero_optimization.{key} = {shown(zero[key])} in {named}: elements of a buffer, from 1 to {LARGEST_BUCKET}")
    stage = zero.get("stage", 0)
    if stage in (1, 2) and isinstance(size := zero.get("allgather_bucket_size"), (int, float)) and size % 2:
        raise ValueError(
            f"zero_optimization.allgather_bucket_size = {shown(size)} in {named}: DeepSpeed takes even numbers of elements alone"
        )
    if stage != 3 and (idle := [key for key in zero if key.startswith("stage3_")]):
        raise ValueError(
            f"zero_optimization.{idle[0]} in {named}: stage 3 alone reads it, and the stage is {stage}: remove it"
            + (f", and {', '.join(idle[1:])}" if len(idle) > 1 else "")
            + ", or set zero_optimization.stage to 3"
        )
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = zero.get(key) or {}
        device = offload.get("device", "none")
        if device == "none":
            continue
        if device != "cpu":
            raise ValueError(f"zero_optimization.{key}.device = {device!r} in {named}: cpu or none; disks are not supported")
        if stage < least:
            raise ValueError(f"zero_optimization.{key} in {named}: it works from stage {least} on, the stage is {stage}; remove it")
        if key == "offload_optimizer" and frozen:
            raise ValueError(f"zero_optimization.{key} in {named}: a teacher is frozen; remove it")
        for inner, only in (("ratio", 1.0), ("super_offload", False), ("fast_init", False)):
            if offload.get(inner, only) != only:
                raise ValueError(f"zero_optimization.{key}.{inner} = {offload[inner]!r} in {named}: not supported; remove it")


def _check_hpz(config: dict[str, Any], named: str, frozen: bool) -> None:
    """hpZ of ZeRO++ (arXiv 2306.10209): a second copy of the weights in each group of ranks, which backwards gather from."""
    zero = config.get("zero_optimization", {})
    size = zero.get("zero_hpz_partition_size") or 1
    if size == 1:
        return
    key = f"zero_optimization.zero_hpz_partition_size = {size} in {named}"
    if frozen:
        raise ValueError(f"{key}: a teacher has no backward, which is what the second copy is for; remove it")
    if zero.get("stage", 0) != 3:
        raise ValueError(f"{key}: stage 3 alone reads it, and the stage is {zero.get('stage', 0)}; remove it, or set the stage to 3")
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        raise ValueError(f"{key}: with offload_param the second copy would be on the host, too, farther than the first; remove one of them")
    ranks = config["train_batch_size"] // (config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"])
    if ranks % size:
        raise ValueError(f"{key}: {ranks} ranks are no whole groups of {size}; set it to the ranks of a node, or remove it")


def _check_model(section: str, content: dict[str, Any], model: type[BaseModel], named: str) -> None:
    """Names and types by the annotations of DeepSpeed's own class, more strictly: "false" is no truth value."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    fields.update(model.model_fields)
    for key, value in content.items():
        if key not in fields:
            shorter = [f"{section}.{field.alias or name}" for name, field in model.model_fields.items()]
            raise ValueError(unknown(f"{section}.{key}", shorter, named))
        options = union_members(fields[key].annotation)
        inner = next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)
        if inner is not None:
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{section}.{key} = {shown(value)} in {named}: a section, an object in braces, is needed here")
            _check_model(f"{section}.{key}", value or {}, inner, named)
        elif value is None and type(None) not in options:
            raise ValueError(f"{section}.{key} = null in {named}: give a value, or remove it for DeepSpeed's default")
        elif (wanted := _plain(options)) is not None:
            check_type(f"{section}.{key}", value, wanted, named)


def _plain(options: tuple[Any, ...]) -> type | None:
    """bool, int, float, str or list, where the annotation says one; DeepSpeed itself checks other types."""
    for option in options:
        kind = get_origin(option) or option
        if isinstance(kind, type) and issubclass(kind, enum.IntEnum | enum.Enum):
            return int if issubclass(kind, int) else str
        if kind in (bool, int, float, str, list):
            return kind  # type: ignore[no-any-return]
        if kind is Path:
            return str
    return None


def _by_deepspeed(config: dict[str, Any], named: str) -> None:
    # batches are checked by `ds_config.resolve`: DeepSpeed may not know the number of ranks yet
    tried = {key: value for key, value in copy.deepcopy(config).items() if key not in SHARED[:3]} | {SHARED[1]: 1}
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        deepspeed.runtime.config.DeepSpeedConfig(tried)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{named}: DeepSpeed refuses {key or 'it'} = {shown(first['input'])}: {first['msg']}") from None
    except Exception as error:  # assertions, KeyError, its own classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{named}: DeepSpeed refuses this configuration: {reason[:500]}") from None
    finally:
        logger.setLevel(level)
