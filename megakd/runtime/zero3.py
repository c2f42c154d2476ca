"""ZeRO-3 of a frozen module: each rank keeps its share of each parameter, a forward gathers them block by block.

1. `settings` reads the DeepSpeed side (ds_configs/teacher_zero3.json is the built-in one, written out).
2. `Partitioner.partition` takes parameters as they arrive from a checkpoint: the first rank's values go to all, each keeps its share.
3. `Partitioned` puts the filled module into DeepSpeed's hands; calling it is the forward.

Parameters keep their types, int8 among them: the configuration names no precision, so DeepSpeed casts nothing.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megakd.runtime import ds_check, ds_config, ds_sections, engine, precision
from megakd.runtime.engine import deepspeed, join
from megakd.runtime.gathered import Gathered
from megakd.runtime.launch import World

BUILT_IN: dict[str, Any] = {
    "steps_per_print": 10**9,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "memory_efficient_linear": False,
        "stage3_max_live_parameters": 150_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_reuse_distance": 0,
    },
}
# What has no effect on a frozen module, or one on the student as well.
_MODE, _FROZEN = "the recipe's teacher.mode says in which precision a teacher runs", "a teacher is frozen"
_ONCE = "the student's DeepSpeed JSON has it, for the whole run"
NOT_OURS = {
    **dict.fromkeys(("bf16", "fp16", "data_types"), _MODE),
    **dict.fromkeys(
        ("optimizer", "scheduler", "gradient_clipping", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), _FROZEN
    ),
    **dict.fromkeys(("tensorboard", "csv_monitor", "wandb", "comet", "comms_logger", "flops_profiler", "wall_clock_breakdown"), _ONCE),
}
# DeepSpeed needs one of them; a forward takes any number of rows.
BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def settings(path: str | None = None, *, offload: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration of a partitioned teacher: the JSON at `path`, or the built-in one.

    offload: keep the shares in pinned memory of the host instead of on the GPU.
    Raises ValueError naming key, file and remedy for what is not a configuration of a frozen ZeRO-3 module.
    """
    config = copy.deepcopy(BUILT_IN)
    name = "(built-in)"
    if path is not None:
        name = f"teacher.ds_config = {path!r}"
        config = ds_config.read_file(path, name, "ds_configs/teacher_zero3.json is an example")
    if key := next((key for key in config if key in NOT_OURS), None):
        raise ValueError(f"{key} in {name}: {NOT_OURS[key]}; remove it")
    for key in BATCHES:
        if config.pop(key, "auto") not in ("auto", 1):
            raise ValueError(f'{key} in {name}: a teacher embeds whatever the student trains on; remove it, or write "auto"')
    ds_sections.check(config, name)
    zero = config.get("zero_optimization", {})
    if type(zero.get("stage")) is not int or zero["stage"] != 3:
        raise ValueError(f"zero_optimization.stage = {zero.get('stage')!r} in {name}: a partitioned teacher needs 3")
    if zero.setdefault("memory_efficient_linear", False):
        raise ValueError(
            f"zero_optimization.memory_efficient_linear = true in {name}: DeepSpeed would replace torch's linear function for the student "
            f"as well; write false"
        )
    config["train_micro_batch_size_per_gpu"] = 1
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    ds_check.check(config, name, frozen=True)
    return config


class Partitioner:
    """Partitions parameters as they come. Every rank hands over the same ones in the same order."""

    def __init__(self, config: dict[str, Any], world: World) -> None:
        self.config = config
        join(world)
        if world.device.type == "cpu" and sys.platform == "linux":
            _return_freed_memory()

    def partition(self, parameters: list[nn.Parameter]) -> None:
        """Replace each parameter, which has a dimension, by this rank's share of the first rank's values.

        DeepSpeed 0.19.8 sends parameters as bytes, which torch refuses for those without a dimension.
        """
        assert all(parameter.ndim > 0 and parameter.is_contiguous() for parameter in parameters)
        deepspeed.zero.Init(module=nn.ParameterList(parameters), config_dict_or_path=self.config)


def overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Put the first rank's `value` into a parameter, which may be partitioned. A collective where it is."""
    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if not engine.is_partitioned(parameter) or dist.get_rank() == 0:
            parameter.data.copy_(value)


def gather_whole(modules: Iterable[nn.Module]) -> None:
    """Have an engine of stage 3 gather all weights of each of these before its forward and its backward, and look inside at none: hooks
    on its layers would cut what is compiled of it into pieces. Before the engine is made.
    """
    for module in modules:
        deepspeed.utils.set_z3_leaf_module(module, True)


def _return_freed_memory() -> None:
    """Have the C library give gathered blocks back to the system when they are freed, of which it keeps those below 32 MB.

    A ZeRO-3 int8 ViT-L-14 on two ranks then peaks at 1.5 GB instead of 2.2 or more, for 3.3 processor seconds a forward instead of 1.6.
    From 4 MB on is not enough: ViT-bigG-14 then peaks at 3.2 GB a rank, from 1 MB on at 2.8.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if set_option is not None:
        trim_threshold, map_threshold = -1, -3
        set_option(trim_threshold, 1 << 20)
        set_option(map_threshold, 1 << 20)


class Partitioned:
    """A frozen module whose parameters `Partitioner.partition` has spread over the ranks. Every rank calls it equally often."""

    def __init__(self, module: nn.Module, config: dict[str, Any]) -> None:
        self.module = module.eval().requires_grad_(False)
        assert all(map(engine.is_partitioned, module.parameters())), "a parameter was never partitioned"
        leaves = gathered_together(module, int(config["zero_optimization"].get("stage3_max_live_parameters", 10**9)) // 2)
        gather_whole(leaves)
        self.gathered = Gathered()
        self._count_gathers(module, set(leaves))
        self._engine, _, _, _ = deepspeed.initialize(model=module, config=config)
        self._engine.eval()

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad(), precision.of_towers(inputs[0].device):
            return self._engine(*inputs)  # type: ignore[no-any-return]

    def _count_gathers(self, module: nn.Module, leaves: set[nn.Module]) -> None:
        """Look at what each part needs just before DeepSpeed does, whose hooks come later; one of `leaves` needs all that is below it."""
        group = list(module.parameters(recurse=module in leaves))
        if group:
            module.register_forward_pre_hook(lambda *_: self._count(group))
        for child in () if module in leaves else module.children():
            self._count_gathers(child, leaves)

    def _count(self, group: list[Any]) -> None:
        gathered: list[Any] = [parameter for parameter in group if not parameter.ds_persist]  # small ones are gathered once and kept
        if gathered:
            ahead = all(parameter.ds_status.name != "NOT_AVAILABLE" for parameter in gathered)  # there, or in flight
            self.gathered.gathers_ahead += ahead
            self.gathered.gathers_late += not ahead

    @property
    def resident_bytes(self) -> int:
        """Bytes of parameters that this rank holds between two forwards: its shares, and small parameters whole."""
        return sum(map(engine.resident_bytes, self.module.parameters()))


def gathered_together(module: nn.Module, limit: int) -> list[nn.Module]:
    """The submodules whose parameters are gathered at once, the largest of at most `limit`: one all-gather a block, not one a layer.

    An attention is one of them, however large: some read their children's weights without calling them (nn.MultiheadAttention, timm's
    EvaAttention), where DeepSpeed's hooks come too late. Containers may not be called themselves, so their children count.
    """
    parameters = list(module.parameters())
    size = sum(engine.full_shape(parameter).numel() for parameter in parameters)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) or size > limit:
        kind, children = type(module).__name__, list(module.children())
        reads_children = "Attention" in kind and "Block" not in kind  # open_clip's ResidualAttentionBlock calls its parts
        if children and not reads_children:
            return [leaf for child in children for leaf in gathered_together(child, limit)]
    return [module] if parameters else []
