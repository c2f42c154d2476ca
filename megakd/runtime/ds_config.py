"""The DeepSpeed JSON: how a run is carried out. `resolve` fills its "auto" values from the recipe and refuses contradictions.

One owner per quantity: batch, learning rate, schedule, weight decay and clipping are the recipe's; ZeRO stage, offload, precision,
micro-batch, buckets and monitors are the JSON's. A key that both have is "auto" (or absent) in the JSON, or says the same.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from megakd.recipe import Recipe, texts
from megakd.runtime import ds_sections
from megakd.runtime.precision import Precision

BUILT_IN = "(built-in default)"


class DsConfig(dict[str, Any]):
    """A DeepSpeed JSON as the dict that DeepSpeed takes and run.json keeps, with what megakd reads of it by name."""

    @property
    def zero(self) -> dict[str, Any]:
        return self.get("zero_optimization") or {}

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 without it."""
        stage: int = self.zero.get("stage", 0)
        return stage

    @property
    def offloads_optimizer(self) -> bool:
        """Whether AdamW's moments are in CPU memory."""
        return bool((self.zero.get("offload_optimizer") or {}).get("device", "none") != "none")

    @property
    def offloads_weights(self) -> bool:
        return bool((self.zero.get("offload_param") or {}).get("device", "none") != "none")

    @property
    def group(self) -> int:
        """Ranks over which ZeRO-3 spreads a second copy of the weights (hpZ); 1 without one."""
        size: int = self.zero.get("zero_hpz_partition_size") or 1
        return size

    @property
    def precision(self) -> Precision:
        """In which the student computes."""
        return "bf16" if self.get("bf16", {}).get("enabled", False) else "fp32"

    @property
    def micro_batch(self) -> int:
        """Pairs of one rank in one forward; of a resolved configuration."""
        return int(self["train_micro_batch_size_per_gpu"])

    @property
    def micro_batches(self) -> int:
        """Of one rank in a step; of a resolved configuration."""
        return int(self["gradient_accumulation_steps"])

    @property
    def accumulates_in_bf16(self) -> bool:
        """Whether micro-batches' gradients add up in bf16; of a resolved configuration."""
        return self.micro_batches > 1 and self.get("data_types", {}).get("grad_accum_dtype") == "bf16"


def read(path: str | None, precision: Precision) -> tuple[dict[str, Any], str]:
    """The JSON at `path`, or the built-in default: ZeRO-1 in bf16, or no ZeRO in fp32, as `precision` says. Returns it with its name."""
    if path is None:
        default = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}} if precision == "bf16" else {}
        return default, BUILT_IN
    return read_file(path, f"--ds_config {path}", "the repository's are in ds_configs/"), path


def read_file(path: str, named: str, examples: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError that begins with `named`; examples: where some are, for one that is missing."""
    if not texts.exists(Path(path)):
        raise ValueError(f"{named}: no such file; {examples}")
    config = texts.read_json(Path(path), named)
    if not isinstance(config, dict):
        raise ValueError(f"{named}: a DeepSpeed configuration is an object, this is a {type(config).__name__}")
    return config


def resolve(config: dict[str, Any], recipe: Recipe, ranks: int, *, config_name: str, recipe_name: str) -> DsConfig:
    """A copy of `config` that DeepSpeed takes, with every shared key filled from the recipe.

    Raises ValueError that names the key, both values and both files where a literal disagrees, and where the global batch does
    not divide over `ranks` and micro-batches.
    """
    ds_sections.check(config, config_name)
    # of the refused sections those that are off are left
    active = DsConfig((key, value) for key, value in copy.deepcopy(config).items() if key not in ds_sections.REFUSED)
    merge = _Merge(active, config_name, recipe_name)
    optim = recipe.optim
    merge.fill("train_batch_size", "optim.batch", optim.batch)
    micro = merge.micro_batch(optim.batch, ranks)
    merge.fill("train_micro_batch_size_per_gpu", "optim.batch / ranks", micro)
    merge.fill("gradient_accumulation_steps", "optim.batch / (micro-batch * ranks)", optim.batch // (micro * ranks))
    merge.fill("gradient_clipping", "optim.clip", optim.clip)
    merge.check_optimizer(recipe)
    merge.precision()
    # DeepSpeed prints "[Rank 0] step=..." every 10 steps unless told otherwise; the run's own log says more.
    merge.config.setdefault("steps_per_print", 10**9)
    return merge.config


class _Merge:
    def __init__(self, config: DsConfig, config_name: str, recipe_name: str) -> None:
        self.config, self.config_name, self.recipe_name = config, config_name, recipe_name

    def fill(self, key: str, owner: str, value: Any, inside: dict[str, Any] | None = None, shown: str | None = None) -> None:
        """Set `key` to the recipe's value; a literal that says something else is an error."""
        section = self.config if inside is None else inside
        literal = section.get(key, "auto")
        if literal != "auto" and not _same(literal, value):
            raise ValueError(
                f"{shown or key} = {literal!r} in {self.config_name} disagrees with {owner} = {value!r} in {self.recipe_name}: "
                f'write "auto" in the JSON, or change the recipe'
            )
        section[key] = value

    def micro_batch(self, batch: int, ranks: int) -> int:
        """Pairs of one rank in one forward: the JSON's literal, or the whole share of a rank."""
        if batch % ranks:
            lower, upper = batch // ranks * ranks, -(-batch // ranks) * ranks
            raise ValueError(
                f"optim.batch = {batch} in {self.recipe_name} does not divide over {ranks} ranks: "
                f"use {lower or upper} or {upper}, or another number of ranks"
            )
        local = batch // ranks
        micro = self.config.get("train_micro_batch_size_per_gpu", "auto")
        steps = self.config.get("gradient_accumulation_steps", "auto")
        if micro == "auto" and steps != "auto":
            micro = local // steps if isinstance(steps, int) and steps > 0 and local % steps == 0 else None
        elif micro == "auto":
            micro = local
        if not isinstance(micro, int) or micro < 1 or local % micro:
            literal = self.config.get("train_micro_batch_size_per_gpu", "auto") != "auto"
            key = "train_micro_batch_size_per_gpu" if literal else "gradient_accumulation_steps"
            raise ValueError(
                f"{key} = {self.config.get(key)!r} in {self.config_name} does not divide a rank's share of the batch: "
                f"optim.batch = {batch} in {self.recipe_name} over {ranks} ranks is {local} each"
            )
        return micro

    def check_optimizer(self, recipe: Recipe) -> None:
        """A section in the JSON may only repeat the recipe's AdamW, which the engine builds, so it leaves the JSON."""
        section = self.config.pop("optimizer", None)
        if section is None:
            return
        kind = section.get("type", "AdamW")
        if str(kind).lower() != "adamw":
            raise ValueError(
                f"optimizer.type = {kind!r} in {self.config_name}: megakd trains with AdamW; remove the section or write AdamW"
            )
        owned = recipe.optim.model_dump(mode="json", include={"lr", "betas", "eps", "weight_decay"})
        params = section.get("params") or {}
        for key, value in params.items():
            if key not in owned:
                raise ValueError(f"optimizer.params.{key} = {value!r} in {self.config_name}: unknown; the recipe owns {', '.join(owned)}")
            self.fill(key, f"optim.{key}", owned[key], params, f"optimizer.params.{key}")

    def precision(self) -> None:
        stage: Any = self.config.stage
        if not isinstance(stage, int) or isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_optimization.stage = {stage!r} in {self.config_name}: give 0, 1, 2 or 3")
        if self.config.precision == "bf16" and stage == 0:
            raise ValueError(
                f"bf16 without ZeRO in {self.config_name}: DeepSpeed would keep no fp32 master weights; "
                f"set zero_optimization.stage to 1, 2 or 3"
            )
        kind = self.config.get("data_types", {}).get("grad_accum_dtype")
        if kind not in (None, "fp32", "bf16"):
            raise ValueError(f"data_types.grad_accum_dtype = {kind!r} in {self.config_name}: write fp32, or bf16 to save memory")
        if kind == "bf16" and self.config.precision == "fp32":
            raise ValueError(f"data_types.grad_accum_dtype = 'bf16' in {self.config_name}: the run is in fp32; remove it, or enable bf16")
        if self.config.precision == "bf16" and self.config.micro_batches > 1:
            # Gradients of micro-batches add up in float32: in bf16 four of them lose 3 thousandths of their norm, and more with each. At
            # stage 1 they are also averaged over ranks in float32, once a step: DeepSpeed would round the sum for that.
            self.config.setdefault("data_types", {})["grad_accum_dtype"] = kind or "fp32"
            if kind != "bf16" and stage == 1:
                self.config.setdefault("communication_data_type", "fp32")


def _same(literal: Any, value: Any) -> bool:
    if isinstance(literal, (int, float)) and isinstance(value, (int, float)) and not isinstance(literal, bool):
        return float(literal) == float(value)
    if isinstance(literal, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(literal) == len(value) and all(_same(a, b) for a, b in zip(literal, value, strict=True))
    return bool(literal == value)
