"""Which keys of a DeepSpeed JSON have an effect here, of which type, and why the others are refused. Needs no DeepSpeed.

A section without an effect in megakd is an error that says what has it, unless it is off.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megakd.recipe.texts import nearest, shown

# Shared with the recipe: "auto" there. `ds_config.resolve` compares them.
SHARED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
SCALARS: dict[str, type] = {
    "steps_per_print": int,
    "dump_state": bool,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "disable_python_gc": bool,
    "communication_data_type": str,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
}
MONITOR = {"enabled": bool, "output_path": str, "job_name": str}
SECTIONS: dict[str, dict[str, type]] = {
    "bf16": {"enabled": bool, "immediate_grad_update": bool, "check_grad_overflow": bool},
    "fp16": {},  # may be there, switched off
    "data_types": {"grad_accum_dtype": str, "keep_in_fp32_modules": object},
    "tensorboard": MONITOR,
    "csv_monitor": MONITOR,
    "wandb": {"enabled": bool, "group": str, "team": str, "project": str},
    "comet": {
        **{"enabled": bool, "samples_log_interval": int, "project": str, "workspace": str, "api_key": str, "experiment_name": str},
        **{"experiment_key": str, "online": bool, "mode": str},
    },
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "flops_profiler": {
        **{"enabled": bool, "recompute_fwd_factor": float, "profile_step": int, "module_depth": int, "top_modules": int},
        **{"detailed": bool, "output_file": str},
    },
    "optimizer": {"type": str, "params": dict},
    "zero_optimization": {},  # DeepSpeed's own class knows them: `ds_check`
    "aio": {},
}
_RESUMES, _MODEL = "checkpoints are megakd's own, for any stage and number of ranks", "the model is data-parallel alone, by ZeRO"
REFUSED = {
    "scheduler": "the schedule is the recipe's (optim.schedule, optim.warmup)",
    "amp": "only bf16 and fp32 are supported; enable bf16 instead",
    "bfloat16": "an old name that megakd does not read; write bf16",
    "torch_autocast": "precision is said by bf16 alone",
    "activation_checkpointing": "the recipe has it: student.activation_checkpointing = true",
    "checkpoint": _RESUMES,
    "nebula": _RESUMES,
    "datastates": _RESUMES,
    "compile": "the recipe has it: student.compile, teacher.compile, and kernels.backend for the losses",
    "data_efficiency": "the order of the data is the recipe's (data.block, data.window)",
    "data_sampling": "the order of the data is the recipe's (data.block, data.window)",
    "curriculum_learning": "the order of the data is the recipe's (data.block, data.window)",
    "dataloader_drop_last": "the order of the data is the recipe's; every batch is whole",
    "hybrid_engine": "nothing is generated in training",
    "pipeline": _MODEL,
    "tensor_parallel": _MODEL,
    "autotp": _MODEL,
    "expert_parallel": _MODEL,
    "sequence_parallel_size": _MODEL,
    "seq_parallel_communication_data_type": _MODEL,
    "use_data_before_expert_parallelism": _MODEL,
    "elasticity": "a run goes on with any number of ranks by itself",
    "autotuning": "it is the deepspeed launcher's; `megakd plan` says what fits",
    "compression_training": "the student is trained as the recipe describes it",
    "quantize_training": "the student is trained as the recipe describes it",
    "weight_quantization": "the student is trained as the recipe describes it",
    "eigenvalue": "the student is trained as the recipe describes it",
    "progressive_layer_drop": "the student is trained as the recipe describes it",
    "sparse_attention": "the student is trained as the recipe describes it",
    "sparse_gradients": "gradients of embeddings are dense",
    "graph_harvesting": "DeepSpeed has removed it",
    "prescale_gradients": "gradients are averaged as the recipe's batch says",
    "gradient_predivide_factor": "gradients are averaged as the recipe's batch says",
    "gradient_allreduce_op": "gradients are averaged as the recipe's batch says",
    "managed_gradient_accumulation": "the trainer counts the accumulation steps",
    "disable_allgather": "without it the ranks' weights would part",
    "log_level": "megakd shows DeepSpeed's warnings and errors alone",
    "vocabulary_size": "the tokenizer says it",
    "timers": "metrics.jsonl has the seconds of each part of a step",
}
TYPES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", list: "a list", dict: "an object"}


def check(config: dict[str, Any], named: str) -> None:
    """Raise ValueError naming key, value, file and remedy for an unknown key, another type, or no effect here."""
    for key, value in config.items():
        if key in REFUSED:
            if not _is_off(value):
                raise ValueError(f"{key} in {named}: {REFUSED[key]}; remove this {'section' if isinstance(value, dict) else 'key'}")
        elif key in SECTIONS:
            if not isinstance(value, dict):
                raise ValueError(f"{key} = {shown(value)} in {named}: a section, an object in braces, is needed here")
            _check_section(key, value, named)
        elif key in SCALARS:
            check_type(key, value, SCALARS[key], named)
        elif key not in SHARED:
            raise ValueError(f"{unknown(key, (*SHARED, *SCALARS, *SECTIONS), named)}")
    for key in SHARED:
        value = config.get(key, "auto")
        integer = key != "gradient_clipping"
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, (int, float) if not integer else int)):
            raise ValueError(
                f'{key} = {shown(value)} in {named}: {TYPES[int if integer else float]} is needed, or "auto" for the recipe\'s'
            )


def _check_section(section: str, content: dict[str, Any], named: str) -> None:
    if section == "fp16":
        if not _is_off(content):
            raise ValueError(f"fp16.enabled in {named}: only bf16 and fp32 are supported; enable bf16 instead")
        return
    known = SECTIONS[section]
    for key, value in content.items():
        if known and key not in known:
            raise ValueError(unknown(f"{section}.{key}", [f"{section}.{name}" for name in known], named))
        if known:
            check_type(f"{section}.{key}", value, known[key], named)


def check_type(key: str, value: Any, wanted: type, named: str) -> None:
    """Raise ValueError for a value of another type; an integer may be written 5e8, and null is DeepSpeed's default."""
    if value is None or wanted is object:
        return
    if value == "auto":
        raise ValueError(
            f'{key} = "auto" in {named}: only what the recipe has can be "auto" ({", ".join(SHARED)}); remove it for DeepSpeed\'s default'
        )
    if wanted is bool:
        fits = isinstance(value, bool)
    elif wanted in (int, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and (wanted is float or float(value).is_integer())
    else:
        fits = isinstance(value, wanted)
    if not fits:
        hint = ", without quotes" if isinstance(value, str) and wanted in (bool, int, float) else ""
        raise ValueError(f"{key} = {shown(value)} in {named}: must be {TYPES.get(wanted, wanted.__name__)}{hint}")


def unknown(key: str, known: Iterable[str], named: str) -> str:
    """The message for a key that DeepSpeed would refuse or pass over."""
    names = sorted(known)
    *section, last = key.rsplit(".", 1)
    near = nearest(key, names) or [name for name in names if last and len(last) > 3 and name.endswith(last)][:1]
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    here = ", ".join(name.rsplit(".", 1)[-1] if section else name for name in names)
    return f"{shown(key)[1:-1]} in {named}: unknown key; {suggestion}known here: {here}"


def _is_off(value: Any) -> bool:
    """Whether it is false, null, or a section that is empty or not enabled."""
    return value in (None, False, {}) or (isinstance(value, dict) and value.get("enabled", True) is False)
