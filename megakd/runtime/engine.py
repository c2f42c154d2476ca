"""DeepSpeed behind one small class; the only importer of deepspeed.

`export` and the constructor's `start` are full, unsharded fp32 weights and moments, whatever the ZeRO stage, so that checkpoints fit any
stage and any number of ranks.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# DeepSpeed compiles operators with the first ninja on PATH: this environment's also where it is not activated, as one of another version
# would compile again, for minutes, what is there.
_PROGRAMS = str(Path(sys.executable).parent)
if not os.environ.get("PATH", "").startswith(_PROGRAMS):
    os.environ["PATH"] = f"{_PROGRAMS}{os.pathsep}{os.environ.get('PATH', '')}"
# Not its level, which DeepSpeed sets anew in initialize().
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.WARNING)

import deepspeed  # noqa: E402
from deepspeed.runtime.zero import parameter_offload  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses  # noqa: E402
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    groups,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from megakd.recipe import Optim  # noqa: E402
from megakd.runtime import monitors, precision  # noqa: E402
from megakd.runtime.ds_config import DsConfig  # noqa: E402
from megakd.runtime.launch import World  # noqa: E402
from megakd.runtime.module_state import load_weights, persistent_buffers  # noqa: E402

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"  # of the weights, which lies with the moments and is shared out over the ranks as they are
# Otherwise DeepSpeed compiles a shared-memory all-reduce on a CPU at the first start, for up to a minute, that only inference calls
# (0.19.8, comm/torch.py).
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True)
class State:
    """Everything the optimizer moves, unsharded and in fp32 on the CPU: weights by parameter name, moments by `MOMENT/name`; among the
    weights also buffers, and parameters that `student.freeze` holds.

    objectives: what losses keep from step to step, see `ObjectiveSet.state`. averages: of the weights that move, by parameter name, and
    of buffers; empty without `optim.ema`.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    updates: int
    objectives: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)

    @property
    def averaged(self) -> dict[str, Tensor]:
        """All weights, with their average in the place of each that has one."""
        return self.weights | self.averages


def join(world: World) -> None:
    """Tell DeepSpeed of the process group that `launch.start` has joined."""
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)


class Engine:
    """The student under DeepSpeed.

    groups: AdamW parameter groups of `module`. config: of `ds_config.resolve`. start: an exported state to go on from. frozen: names of
    parameters that are not trained and are exported all the same, in float32 as they came, whatever the engine rounds them to.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, object]],
        optim: Optim,
        config: dict[str, Any],
        world: World,
        start: State | None,
        frozen: Collection[str] = (),
    ) -> None:
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        known = DsConfig(config)
        if start is not None:
            load_weights(module, start.weights)
        kept = ((name, parameter) for name, parameter in module.named_parameters() if name in frozen)
        self._frozen = {name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in kept}
        join(world)
        self.dtype, self._device = precision.dtype(known.precision), world.device
        if self.dtype != torch.float32:
            for parameter in module.parameters():
                if parameter.numel() == 1 and parameter.is_floating_point():  # trained ones follow the optimizer
                    parameter.in_float32 = parameter.detach().float().clone()  # type: ignore[attr-defined]
        optimizer = _adamw(groups, optim, known)
        self.stage = known.stage
        # without ZeRO DeepSpeed does not tell the norm, so `update` clips
        self._clip = float(config["gradient_clipping"]) if self.stage == 0 else 0.0
        handed_over = {**config, "gradient_clipping": 0.0} if self.stage == 0 else config
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=handed_over)
        csv = getattr(self._engine.monitor, "csv_monitor", None)
        if csv is not None:  # it would write another header into files that have one
            csv.filenames += monitors.header_is_there(config)
        if start is not None:  # by which DeepSpeed numbers its own values for monitors
            self._engine.global_samples = start.updates * self._engine.train_batch_size()
        self.micro_batch = known.micro_batch
        self.accumulation = known.micro_batches
        self._norm: Tensor | float = math.nan
        norms = [part for part in self.module.modules() if isinstance(part, precision.BatchNorm)]
        self._persistent = list(persistent_buffers(self.module).values())
        self._statistics = [own for part in norms for own in (part.running_mean, part.running_var) if own is not None]
        self.updates = 0 if start is None else start.updates
        self._ema = optim.ema
        moved = persistent_buffers(self.module).items() if self._ema is not None else ()
        self._averaged = {name: (buffer, buffer.detach().clone()) for name, buffer in moved if buffer.is_floating_point()}
        self._make_moments()
        if start is not None:
            self._restore(start)
        self._scalars = [parameter for parameter in self._trained() if hasattr(parameter, "in_float32")]
        self._refresh_scalars()

    @property
    def module(self) -> nn.Module:
        return self._engine.module  # type: ignore[no-any-return]

    def forward(self, *inputs: Tensor | None, **named: Any) -> dict[str, Tensor]:
        """The module's outputs. named: tensors and what holds them; DeepSpeed's hooks look at `inputs` alone (0.19.8)."""
        with precision.of_towers(self._device):
            return self._engine(*inputs, **named)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, whose mean over ranks and sum over accumulation steps is the global batch's.

        That mean is taken here with ZeRO, and without it by `reduce`.
        """
        alone = self._engine.no_sync() if self.stage == 0 else contextlib.nullcontext()
        with precision.of_towers(self._device), self.unmoved_buffers(), alone:  # activation checkpointing repeats forwards in here
            self._engine.backward(loss * self.accumulation)
        self._is_reduced = False

    def reduce(self) -> None:
        """Without ZeRO, average the gradients over the ranks, after the last backward: a time of its own, which is not the towers'. What
        has none gets zeros, as with ZeRO: AdamW would leave its weight decay out. `update` does this where nobody has."""
        if self.stage == 0 and not self._is_reduced:
            for parameter in (one for one in self._trained() if one.grad is None):
                parameter.grad = torch.zeros_like(parameter)
            if self._engine.world_size > 1:  # of one rank DeepSpeed would copy them all, to and fro
                self._engine.allreduce_gradients()
        self._is_reduced = True

    def accumulated(self) -> None:
        """Close one accumulation step that is not the last: DeepSpeed counts them in `step`."""
        self._engine.step()

    def update(self, lr: float) -> None:
        """Clip, move the weights with this learning rate (times a group's own `lr_factor`), and clear the gradients."""
        self.reduce()
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        if self.stage == 0:
            self._norm = nn.utils.clip_grad_norm_(self._trained(), self._clip or math.inf)
        self._engine.step()
        if self.stage > 0:
            self._norm = self._engine.get_global_grad_norm()
        self._share_statistics()
        self._refresh_scalars()
        self.updates += 1
        self._average()

    def _average(self) -> None:
        """Move the average of the weights: each rank that of its share, so it is the same on any number of them."""
        decay = None if self._ema is None else self._ema.decay_after(self.updates)
        if decay is None:
            return
        base = self._base_optimizer()
        with torch.no_grad():
            for flat in self._flat():
                base.state[flat][AVERAGE].lerp_(flat.detach(), 1 - decay)
            for buffer, average in self._averaged.values():
                average.lerp_(buffer, 1 - decay)

    def _refresh_scalars(self) -> None:
        """Keep the optimizer's float32 value with each rounded parameter of one number, for `precision.exact`. A collective."""
        for parameter in self._scalars:
            parameter.in_float32 = self._full(parameter, None).detach().to(parameter.device)  # type: ignore[attr-defined]

    def _share_statistics(self) -> None:
        """Give every rank rank 0's running statistics of batch norm, as DistributedDataParallel does: they are saved and evaluated."""
        if self._statistics and self._engine.world_size > 1:
            shared = nn.utils.parameters_to_vector(self._statistics)
            dist.broadcast(shared, 0)
            for own, first in zip(self._statistics, shared.split([own.numel() for own in self._statistics]), strict=True):
                own.copy_(first.view_as(own))

    @property
    def gradient_norm(self) -> float:
        """Global gradient norm of the last update, before clipping; NaN before the first. Waits for the device."""
        return float(self._norm)

    def close(self) -> None:
        """Remove gradient hooks, which no garbage collection finds and which hold weights, moments and ZeRO's buckets; see also `forget`.

        Neither the engine nor its module is of use afterwards.
        """
        self._engine.destroy()
        del self._engine, self._optimizer

    def monitor(self, values: dict[str, float], samples: int, group: str = "Train") -> None:
        """Hand named values to the monitors of the JSON (TensorBoard, W&B, CSV, Comet), as GROUP/NAME."""
        if self._engine.monitor.enabled:
            self._engine.monitor.write_events([(f"{group}/{name}", value, samples) for name, value in values.items()])

    def export(self, *, moments: bool, everywhere: bool, averages: bool = False) -> State:
        """Full fp32 state on the CPU: on rank 0, or `everywhere`; elsewhere an empty one. A collective: every rank calls it."""
        kept = State({}, {}, self.updates)
        keep = everywhere or self._engine.global_rank == 0
        averaging = averages and self._ema is not None
        for parameter in self._trained():
            name = self._names[id(parameter)]
            for key in (None, *(MOMENTS if moments else ()), *((AVERAGE,) if averaging else ())):
                full = self._full(parameter, key)
                if keep:
                    destination, label = (kept.moments, f"{key}/{name}") if key in MOMENTS else (kept.averages, name)
                    if key is None:
                        destination = kept.weights
                    destination[label] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        if keep:
            kept.weights.update(self._frozen)
            if averaging:
                kept.averages.update({name: average.cpu().clone() for name, (_, average) in self._averaged.items()})
            kept.weights.update({name: buffer.detach().cpu().clone() for name, buffer in persistent_buffers(self.module).items()})
        return kept

    @contextlib.contextmanager
    def unmoved_buffers(self) -> Iterator[None]:
        """Forwards in here, which others repeat, leave the module's persistent buffers as they were, such as batch norm's statistics."""
        before = [buffer.clone() for buffer in self._persistent]
        try:
            yield
        finally:
            for buffer, kept in zip(self._persistent, before, strict=True):
                buffer.copy_(kept)

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the module computes with these weights, of an export. A ZeRO-3 one, which has none between forwards, stays as it is."""
        targets = dict(self.module.named_parameters()) | persistent_buffers(self.module)
        moved = {name: targets[name] for name in weights if name not in self._frozen} if self.stage < 3 else {}
        scalars = [parameter for name, parameter in moved.items() if hasattr(parameter, "in_float32")]
        before = {name: own.detach().to("cpu", copy=True) for name, own in moved.items()}
        exact: list[Any] = [parameter.in_float32 for parameter in scalars]
        try:
            load_weights(self.module, {name: weights[name] for name in moved})
            for parameter in scalars:
                parameter.in_float32 = weights[self._names[id(parameter)]].to(parameter.device)  # type: ignore[attr-defined]
            yield
        finally:
            load_weights(self.module, before)
            for parameter, own in zip(scalars, exact, strict=True):
                parameter.in_float32 = own  # type: ignore[attr-defined]

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self._optimizer, "optimizer", self._optimizer)  # type: ignore[no-any-return]

    def _full(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        if self.stage == 0:
            full = parameter if key is None else self._base_optimizer().state[parameter][key]
        else:
            full = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
            full = full.reshape(full_shape(parameter))
        return full  # type: ignore[no-any-return]

    def _restore(self, start: State) -> None:
        for parameter in self._trained():
            name = self._names[id(parameter)]
            self._set(parameter, start.weights[name], None)
            for key in MOMENTS:
                self._set(parameter, start.moments[f"{key}/{name}"], key)
            if self._ema is not None:
                self._set(parameter, start.averages[name], AVERAGE)
        for name, (_, average) in self._averaged.items():
            average.copy_(start.averages[name])
        base: Any = self._base_optimizer()
        if hasattr(base, "ds_opt_adam"):
            _replay_bias_correction(base, start.updates)

    def _make_moments(self) -> None:
        """Make AdamW's moments before its first step, for a resumed run to fill.

        DeepSpeed 0.19.8 would also link them to the parameters when the first of several groups has moved, and never find the others'.
        """
        base = self._base_optimizer()
        for parameter in self._flat():
            step: Any = self.updates
            if isinstance(base, torch.optim.AdamW):
                step = torch.tensor(float(self.updates), device=parameter.device)
            base.state[parameter] = {"step": step, **{key: torch.zeros_like(parameter.data, dtype=torch.float32) for key in MOMENTS}}
            if self._ema is not None:
                base.state[parameter][AVERAGE] = parameter.detach().float().clone()
        link = getattr(self._optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _flat(self) -> list[Tensor]:
        """What the optimizer moves, in float32: this rank's share."""
        if self.stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [parameter for group in self._base_optimizer().param_groups for parameter in group["params"]]

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        value = value.to(parameter.device)
        if self.stage == 0:
            if key is not None:
                self._base_optimizer().state[parameter][key].copy_(value)
        elif self.stage == 3:
            # DeepSpeed 0.19's setter of full tensors slices beyond the end where ranks do not divide the size
            numel = safe_get_local_fp32_param(parameter).numel()
            piece = value.flatten()[self._engine.global_rank * numel :][:numel]
            piece = torch.cat([piece, piece.new_zeros(numel - piece.numel())])
            if key is None:
                safe_set_local_fp32_param(parameter, piece)
            else:
                safe_set_local_optimizer_state(parameter, piece, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 keeps a share of it on each rank."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Also of a partitioned one, which is empty between two forwards."""
    return getattr(parameter, "ds_shape", parameter.shape)


def resident_bytes(partitioned: nn.Parameter) -> int:
    """Bytes that this rank holds of it: its share, and what is gathered now."""
    share: Tensor = partitioned.ds_tensor  # type: ignore[attr-defined]
    return share.nbytes + partitioned.data.nbytes


def forget() -> None:
    """Undo what ZeRO-3 does to a whole process (0.19.8): a stack of modules, methods' cached results, torch's linear function replaced,
    hpZ's groups of ranks, which engines without hpZ would take as well.

    For when no engine is in use any more, partitioned teachers included.
    """
    torch.nn.functional.linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", torch.nn.functional.linear)
    parameter_offload.FWD_MODULE_STACK.clear()
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    for method in filter(inspect.isfunction, vars(PartitionedParameterCoordinator).values()):
        for wrapped in inspect.getclosurevars(method).nonlocals.values():
            if hasattr(wrapped, "cache_clear"):
                wrapped.cache_clear()


def _adamw(groups: list[dict[str, object]], optim: Optim, config: DsConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if config.offloads_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled on first use, so only where it is needed

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, fused=True, **settings)


def _replay_bias_correction(optimizer: Any, updates: int) -> None:
    """DeepSpeedCPUAdam multiplies beta^t up step by step, in C++; a new one would take a power, which rounds differently."""
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    nothing = [torch.zeros(1) for _ in range(4)]
    for step in range(1, updates + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *nothing)
