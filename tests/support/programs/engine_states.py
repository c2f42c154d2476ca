"""Trains a small module through every DeepSpeed configuration and saves what it exported. Imported by test_engine.py for one rank, and
started by it for two: `engine_states.py FOLDER [FOLDER_OF_OTHER_RANKS]`.

For each configuration: four updates undisturbed; the state after two; two more from that state in a new engine. With the states of
another number of ranks, two updates from those as well.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megakd.recipe import Ema, Optim
from megakd.runtime import launch
from megakd.runtime.engine import Engine, State, forget
from megakd.runtime.launch import World
from megakd.runtime.precision import exact
from support.parameter_groups import decay_groups


def why_not_compile() -> str | None:
    """DeepSpeed compiles the CPU Adam that offloading takes: None when that can work here, else what is missing."""
    if not any(map(shutil.which, ("c++", "g++"))):
        return "DeepSpeed compiles its CPU Adam: no C++ compiler here (Debian: apt-get install g++)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "DeepSpeed compiles its CPU Adam: no Python headers here (Debian: apt-get install python3-dev)"
    return None


STAGES_FP32, STAGES_BF16 = (0, 1, 2, 3), (1, 2, 3)
ROWS = 8  # the global batch
OPTIM = Optim(steps=4, batch=ROWS, lr=0.05, weight_decay=0.1, clip=0.5, eps=1e-3, ema=Ema(decay=0.75))
OFFLOADED = "stage3_bf16_offload"
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    **{f"stage{stage}_fp32": {"zero_optimization": {"stage": stage}} for stage in STAGES_FP32},
    **{f"stage{stage}_bf16": {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}} for stage in STAGES_BF16},
    OFFLOADED: {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    },
}
if why_not_compile():
    del CONFIGURATIONS[OFFLOADED]
# In two pieces, added up as `ds_config.resolve` has it.
ACCUMULATED = [f"stage{stage}_bf16_accumulated" for stage in STAGES_BF16]
CONFIGURATIONS |= {
    name: {**CONFIGURATIONS[name.removesuffix("_accumulated")], "data_types": {"grad_accum_dtype": "fp32"}} for name in ACCUMULATED
}
CONFIGURATIONS[ACCUMULATED[0]]["communication_data_type"] = "fp32"


class Odd(nn.Module):
    """Sizes that two ranks do not divide, a parameter of one number, a buffer: 7 x 5, 5, 5, 3 x 5, 3, 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.log_scale = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("offset", torch.full((3,), 0.25))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scale = exact(self.log_scale).exp()
        return {"y": (self.last(torch.tanh(self.norm(self.first(x)))) + self.offset.to(x.dtype)) * scale, "scale": scale}


def config_of(name: str, ranks: int) -> dict[str, Any]:
    pieces = 2 if name in ACCUMULATED else 1
    shared = {"train_batch_size": ROWS, "train_micro_batch_size_per_gpu": ROWS // ranks // pieces, "gradient_accumulation_steps": pieces}
    return {**CONFIGURATIONS[name], **shared, "gradient_clipping": OPTIM.clip, "steps_per_print": 10**9}


def make(name: str, world: World, start: State | None) -> Engine:
    module = Odd()
    return Engine(module, decay_groups(module, OPTIM.weight_decay), OPTIM, config_of(name, world.size), world, start)


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 7, generator=generator), 3 * torch.randn(ROWS, 3, generator=generator)


def advance(engine: Engine, world: World, first: int, last: int) -> list[float]:
    """Updates `first`..`last` - 1 on this rank's rows; returns the gradient norms."""
    norms = []
    own = slice(world.rank * ROWS // world.size, (world.rank + 1) * ROWS // world.size)
    for step in range(first, last):
        pieces = list(zip(*(part[own].tensor_split(engine.accumulation) for part in data(step)), strict=True))
        for number, (x, y) in enumerate(pieces, 1):
            engine.backward((engine.forward(x.to(engine.dtype))["y"].float() - y).square().mean() / len(pieces))
            if number < len(pieces):
                engine.accumulated()
        engine.update(OPTIM.lr)
        norms.append(engine.gradient_norm)
    return norms


def measure(name: str, world: World, foreign: State | None) -> dict[str, Any]:
    engine = make(name, world, None)
    trail = [engine.export(moments=False, everywhere=True).weights]
    norms = advance(engine, world, 0, 1)
    first = engine.export(moments=True, everywhere=True, averages=True)
    norms += advance(engine, world, 1, 2)
    middle = engine.export(moments=True, everywhere=True, averages=True)
    norms += advance(engine, world, 2, 3)
    trail += [first.weights, middle.weights, engine.export(moments=False, everywhere=True).weights]
    norms += advance(engine, world, 3, 4)
    end = engine.export(moments=True, everywhere=True, averages=True)
    with torch.no_grad():
        scale = engine.forward(data(0)[0].to(engine.dtype))["scale"]
        with engine.holding(end.averaged):
            averaged_scale = engine.forward(data(0)[0].to(engine.dtype))["scale"]
    unmoved = engine.export(moments=True, everywhere=True, averages=True)
    engine.close()
    again = make(name, world, middle)
    restored = again.export(moments=True, everywhere=True, averages=True)
    found = {"norms": norms, "middle": vars(middle), "end": vars(end), "restored": vars(restored), "scale": scale, "first": vars(first)}
    found |= {"trail": [*trail, end.weights], "averaged_scale": averaged_scale, "unmoved": vars(unmoved)}
    found["norms_resumed"] = norms[:2] + advance(again, world, 2, 4)
    found["end_resumed"] = vars(again.export(moments=True, everywhere=True, averages=True))
    again.close()
    if foreign is not None:
        guest = make(name, world, foreign)
        found["foreign_restored"] = vars(guest.export(moments=True, everywhere=True, averages=True))
        advance(guest, world, 2, 4)
        found["end_of_foreign"] = vars(guest.export(moments=True, everywhere=True, averages=True))
        guest.close()
    return found


def measure_all(world: World, folder: Path, foreign: Path | None) -> None:
    """Writes FOLDER/NAME.pt on the main rank."""
    for name in CONFIGURATIONS:
        start = None if foreign is None else State(**torch.load(foreign / f"{name}.pt", weights_only=True)["middle"])
        found = measure(name, world, start)
        if world.is_main:
            torch.save(found, folder / f"{name}.pt")
        forget()


if __name__ == "__main__":
    measure_all(launch.start(), Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    launch.stop()
