"""DeepSpeed JSONs as people write, copy and break them: megakd's message, or a run that does what the JSON says."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.campaign import Mutant
from faults.tiny_commands import SHORT, recipe_in, tried

NAME, COUNT, LIMIT = "ds_json", 320, 90.0
FEW = 12

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
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    10**20,
    1e308,
    "auto",
    "",
    "true",
    "no",
    [],
    {},
    [[]],
    {"enabled": True},
    "é\u2028",
    0.5,
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


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _parent(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _value(config: dict[str, Any], draw: random.Random) -> str:
    places = list(_places(config))
    if not places:
        return _key(config, draw)
    path, value = draw.choice(places), draw.choice(VALUES)
    _parent(config, path)[path[-1]] = copy.deepcopy(value)
    return f"{'.'.join(map(str, path))} = {value!r}"


def _misspelt(config: dict[str, Any], draw: random.Random) -> str:
    places = [path for path in _places(config) if isinstance(path[-1], str)]
    if not places:
        return _zero_key(config, draw)
    path = draw.choice(places)
    name = path[-1]
    cut = draw.randrange(len(name))
    wrong = draw.choice([name[:cut] + name[cut + 1 :], name[:cut] + "x" + name[cut:], name.upper(), name.replace("_", "-"), f" {name}"])
    inner = _parent(config, path)
    inner[wrong] = inner.pop(name)
    return f"{'.'.join(map(str, path))} spelt {wrong!r}"


CHANGES: tuple[Callable[[dict[str, Any], random.Random], str], ...] = (_key, _key, _zero_key, _zero_key, _value, _misspelt)


def _as_text(text: str, draw: random.Random) -> tuple[str, bytes]:
    """What happens to the file rather than to its content."""
    deep = draw.choice([60, 3000, 200_000])
    kinds: dict[str, bytes] = {
        "byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "Latin-1": text.replace("{", '{"caf\u00e9": 1, ', 1).encode("latin-1"),
        "cut off": text[: draw.randrange(max(1, len(text)))].encode(),
        "trailing comma": text.replace("}", ",}", 1).encode(),
        "comment": f"// mine\n{text}".encode(),
        "single quotes": text.replace('"', "'").encode(),
        "twice the same key": text.replace("{", '{"steps_per_print": 7, "steps_per_print": 9, ', 1).encode(),
        "NaN": text.replace("{", '{"gradient_clipping": NaN, ', 1).encode(),
        "Infinity": text.replace("{", '{"gradient_clipping": 1e999, ', 1).encode(),
        "thousands of digits": text.replace("{", '{"steps_per_print": ' + "9" * 5000 + ", ", 1).encode(),
        f"{deep} levels": ("[" * deep + "]" * deep).encode(),
        f"{deep} levels of objects": ('{"a":' * deep + "1" + "}" * deep).encode(),
        "a lone surrogate": text.replace("{", '{"\\ud800": 1, ', 1).encode(),
        "NUL": text.encode() + b"\0",
        "empty": b"",
        "a list": f"[{text}]".encode(),
        "a string": json.dumps(text).encode(),
        "flipped bit": _flipped(text.encode(), draw),
    }
    name = draw.choice(list(kinds))
    return name, kinds[name]


def _flipped(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]


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
            done, content = _as_text(json.dumps(config), draw)
            name += f", {done}"
        path = folder / f"{number}.json"
        path.write_bytes(content)
        yield Mutant(name + (" as teacher.ds_config" if teacher else ""), _attempt(recipe, path, folder / f"run{number}", teacher))


TEACHER = (
    "teacher.architecture={ embed_dim = 24, vision_cfg = { image_size = 48, patch_size = 16, width = 32, layers = 1, head_width = 16 }, "
    "text_cfg = { context_length = 24, width = 32, heads = 2, layers = 1 } }",
    "teacher.pretrained=random",
    "objectives.similarity=1.0",
    "teacher.mode=zero3",
)


def _attempt(recipe: Path, config: Path, out: Path, teacher: bool) -> Callable[[], str]:
    sets = (*TEACHER, f"teacher.ds_config={config}") if teacher else ()
    arguments = () if teacher else ("--ds_config", config)
    return lambda: tried(recipe, *arguments, sets=sets, out=out, short=SHORT)
