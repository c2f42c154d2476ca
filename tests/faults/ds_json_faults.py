"""DeepSpeed JSONs as people write, copy and break them: megakd's message, or a run that does what the JSON says."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults import damage
from faults.campaign import Mutant
from faults.tiny_commands import recipe_in, tried
from support.runs import TEACHER

NAME, COUNT, LIMIT, FEW = "ds_json", 320, 90.0, 12

BUCKETS = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
THIRD = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 100_000, "stage3_max_live_parameters": 100_000}
SOUND: tuple[dict[str, Any], ...] = (
    {},
    {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 4, "gradient_clipping": "auto"},
    {"zero_optimization": {"stage": 1, **BUCKETS}, "bf16": {"enabled": True}},
    {"zero_optimization": {"stage": 2, "overlap_comm": False, "contiguous_gradients": True, **BUCKETS}, "wall_clock_breakdown": False},
    {"zero_optimization": {"stage": 3, **BUCKETS, **THIRD}, "train_micro_batch_size_per_gpu": 8},
    {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.98], "weight_decay": "auto"}}, "steps_per_print": 100},
)
TEACHERS = {"stage": 3, "memory_efficient_linear": False, **THIRD}
# Real keys of DeepSpeed's and of others' JSONs, with values that those have.
KEYS: tuple[tuple[str, Any], ...] = (
    *(("fp16", {"enabled": value}) for value in (True, False, "auto", 1)),
    ("fp16", {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}),
    *(("bf16", value) for value in ({"enabled": "auto"}, {"enabled": "true"}, {"enabled": 1}, True, "on", None, [], {"enable": True})),
    *(("bf16", {"enabled": True, key: value}) for key, value in (("immediate_grad_update", True), ("bf16_master_weights_and_grads", True))),
    ("bfloat16", {"enabled": True}),
    *(("amp", value) for value in ({"enabled": True, "opt_level": "O1"}, {"enabled": False})),
    ("torch_autocast", {"enabled": True, "dtype": "bfloat16"}),
    *(("data_types", {"grad_accum_dtype": value}) for value in ("fp32", "bf16", "fp17", 32, None)),
    ("data_types", {"param_dtype": "fp32"}),
    ("activation_checkpointing", {"partition_activations": True, "cpu_checkpointing": False}),
    ("checkpoint", {"tag_validation": "Warn"}),
    ("scheduler", {"type": "WarmupLR", "params": {}}),
    *(
        ("optimizer", value)
        for value in ({"type": "Adam"}, {"type": "AdamW", "params": {"lr": "1e-3"}}, {"type": 3}, [], "AdamW", {"params": []})
    ),
    ("optimizer", {"type": "AdamW", "params": {"torch_adam": True}}),
    *(("flops_profiler", {"enabled": True, **more}) for more in ({}, {"profile_step": 1, "detailed": False}, {"profile_step": "1"})),
    *(("comms_logger", {"enabled": True, **more}) for more in ({}, {"verbose": True}, {"prof_ops": "all_reduce"}, {"verbos": True})),
    *(("csv_monitor", {"enabled": True, "output_path": value, "job_name": "x"}) for value in (3, None, "\x00")),
    ("wandb", {"enabled": "true"}),
    ("comet", {"enabled": True}),
    ("compression_training", {"weight_quantization": {}}),
    ("curriculum_learning", {"enabled": True}),
    ("data_efficiency", {"enabled": True, "seed": 1}),
    ("hybrid_engine", {"enabled": True}),
    ("pipeline", {"stages": 2}),
    ("autotuning", {"enabled": True}),
    ("elasticity", {"enabled": True, "max_train_batch_size": 16}),
    ("sparse_attention", {"mode": "fixed"}),
    ("sparse_gradients", True),
    ("tensor_parallel", {"autotp_size": 2}),
    ("aio", {"block_size": 1048576}),
    *((key, value) for key in ("wall_clock_breakdown", "memory_breakdown", "dump_state") for value in (True, "false", 0, "auto")),
    *(("steps_per_print", value) for value in (1, 0, -1, "10", None, 2.5)),
    *(("communication_data_type", value) for value in ("fp32", "bf16", "fp64", 3)),
    *(("zero_force_ds_cpu_optimizer", value) for value in (True, False)),
    *(("gradient_accumulation_steps", value) for value in (1, 2, "2", 0, 3, 1.0, True, None, [1])),
    *(("train_micro_batch_size_per_gpu", value) for value in (1, 16, 17, "4", True, None, 2.0, {}, -4)),
    *(("train_batch_size", value) for value in (16, 16.0, "16", 8, True, None, [16])),
    *(("gradient_clipping", value) for value in (1.0, 1, "1.0", 0.5, True, None, {})),
    *(("prescale_gradients", value) for value in (True, False)),
    ("zero_allow_untested_optimizer", True),
    ("gradient_predivide_factor", 2.0),
    ("seq_parallel_communication_data_type", "fp32"),
    ("log_level", "info"),
    ("compile", {"enabled": True}),
    ("train_micro_batch_size", 4),
    ("zero_optimisation", {"stage": 2}),
    ("gradient_clip", 1.0),
    ("", {}),
)
ZERO_KEYS: tuple[tuple[str, Any], ...] = (
    *(("stage", value) for value in (0, 1, 2, 3, 4, -1, "2", True, None, 2.0, "auto", [])),
    *(
        (key, value)
        for key in ("overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions", "round_robin_gradients")
        for value in (True, False, "true", "auto", 0, None)
    ),
    *(
        (key, value)
        for key in ("reduce_bucket_size", "allgather_bucket_size")
        for value in (1e5, 5000, 0, -5, "5e8", "auto", 10**15, 1.5, None)
    ),
    *(("offload_optimizer", {"device": value}) for value in ("none", "nvme", "gpu", "CPU", 3, None)),
    *(("offload_param", value) for value in ({"device": "none"}, {"device": "nvme", "nvme_path": "/nope"}, "cpu", {"devise": "cpu"}, True)),
    ("offload_param", {"device": "cpu", "pin_memory": "false"}),
    *((key, True) for key in ("cpu_offload", "zero_quantized_gradients", "zero_quantized_weights", "elastic_checkpoint", "legacy_stage1")),
    *((key, 10**9) for key in ("sub_group_size", "stage3_max_reuse_distance", "stage3_model_persistence_threshold")),
    ("stage3_gather_16bit_weights_on_model_save", True),
    ("stage3_max_live_parameter", 10**9),
    ("stage3_prefetch_bucket_size", "auto"),
    ("stage3_param_persistence_threshold", -1),
    ("ignore_unused_parameters", False),
    ("compute_grad_norm", False),
    ("memory_efficient_linear", False),
    ("memory_efficient_linear", True),
    ("zero_hpz_partition_size", 8),
    ("zenflow", {"topk_ratio": 0.1}),
    ("leaf_module", {"classes": ["Block"]}),
    ("mics_shard_size", 2),
    ("loco_param", {"err_beta": 0.8}),
    ("sub_group_size", 1),
    ("round_robin_gradient", True),
)


def _key(config: dict[str, Any], draw: random.Random) -> str:
    key, value = draw.choice(KEYS)
    config[key] = copy.deepcopy(value)
    return f"{key} = {value!r}"


def _zero_key(config: dict[str, Any], draw: random.Random) -> str:
    key, value = draw.choice(ZERO_KEYS)
    if not isinstance(config.get("zero_optimization"), dict):
        config["zero_optimization"] = {"stage": draw.choice([1, 2, 3]), **BUCKETS}
    config["zero_optimization"][key] = copy.deepcopy(value)
    return f"zero_optimization.{key} = {value!r}"


def _value(config: dict[str, Any], draw: random.Random) -> str:
    return damage.json_value(config, draw)[0] if config else _key(config, draw)


def _misspelt(config: dict[str, Any], draw: random.Random) -> str:
    if not config:
        return _zero_key(config, draw)
    holder, name, keys = damage.json_place(config, draw)
    if not isinstance(name, str):
        return _value(config, draw)
    cut = draw.randrange(len(name) + 1)
    wrong = draw.choice([name[:cut] + name[cut + 1 :], name[:cut] + "x" + name[cut:], name.upper(), name.replace("_", "-"), f" {name}"])
    holder[wrong] = holder.pop(name)
    return f"{'.'.join(map(str, keys))} spelt {wrong!r}"


CHANGES: tuple[Callable[[dict[str, Any], random.Random], str], ...] = (_key, _key, _zero_key, _zero_key, _value, _misspelt)


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    recipe = recipe_in(folder)
    for number in range(count):
        teacher = draw.random() < 0.15
        config = copy.deepcopy({"zero_optimization": TEACHERS} if teacher else draw.choice(SOUND))
        name = f"{number}: {json.dumps(config)[:90]} with " + " and ".join(
            draw.choice(CHANGES[2:] if teacher else CHANGES)(config, draw) for _ in range(draw.choice([1, 1, 2]))
        )
        content = json.dumps(config).encode()
        if draw.random() < 0.2:
            done, content = damage.json_text(json.dumps(config), draw)
            name += f", {done}"
        path = folder / f"{number}.json"
        path.write_bytes(content)
        if teacher:
            sets = (*TEACHER, "objectives.similarity=1.0", "teacher.mode=zero3", f"teacher.ds_config={path}")
            attempt = functools.partial(tried, recipe, sets=sets, out=folder / f"run{number}")
        else:
            attempt = functools.partial(tried, recipe, "--ds_config", path, out=folder / f"run{number}")
        yield Mutant(f"{name}{' as teacher.ds_config' if teacher else ''}", attempt)
