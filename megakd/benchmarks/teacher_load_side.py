"""One rank of `megakd bench teacher-load`: loads a teacher in one of its modes, embeds a few pairs, and says what that took.

`teacher_load_side.py SETTINGS FOLDER` under torchrun; writes FOLDER/rank-N.json. Started as a file with -P, so megakd/ is not on its path.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import torch

from megakd.models import clip, streaming
from megakd.recipe import Teacher
from megakd.runtime import collectives, launch
from megakd.runtime.files import write_text
from megakd.runtime.launch import World
from megakd.runtime.stopwatch import resident_gb
from megakd.teachers import build
from megakd.teachers.base import settings_of


def description(model: str, pretrained: str, mode: str = "replicated") -> clip.ModelSpec:
    """Of a teacher whose tokenizer need not be here: the texts are random tokens."""
    config = open_clip.get_model_config(model)
    if config is None:
        raise ValueError(f"--model {model}: open_clip has no such model; `open_clip.list_models()` lists all")
    settings = Teacher(model=model, pretrained=pretrained, mode=mode)
    return clip.ModelSpec("teacher", settings, config, {}, lambda texts: torch.zeros(len(texts), 1))


def measure(settings: dict[str, Any], world: World) -> dict[str, Any]:
    """Seconds, and gigabytes of this process: resident at the start, after loading, the peaks; read from files while loading."""
    read, start, began = _read_bytes(), resident_gb("VmRSS"), time.perf_counter()
    described = description(settings["model"], settings["weights"], settings["mode"])
    teacher = build.load(described, world, streaming.Int8() if settings_of(described).int8 else None)
    collectives.barrier(world)
    found: dict[str, Any] = {
        "rank": world.rank,
        "load_seconds": time.perf_counter() - began,
        "start_gb": start,
        "loaded_gb": resident_gb("VmRSS"),
        "peak_loading_gb": resident_gb("VmHWM"),
        "read_gb": (_read_bytes() - read) / 1e9,
    }
    config = open_clip.get_model_config(settings["model"])
    size, length = config["vision_cfg"]["image_size"], config["text_cfg"].get("context_length", 77)
    pixels = torch.randn(settings["pairs"], 3, size, size, dtype=teacher.dtype, device=world.device)
    tokens = torch.randint(1, 1000, (settings["pairs"], length), device=world.device)
    seconds = []
    for _ in range(settings["forwards"]):
        began = time.perf_counter()
        embedded = teacher.embed(pixels, tokens)
        assert embedded.image.isfinite().all()
        assert embedded.text.isfinite().all()
        seconds.append(time.perf_counter() - began)
    found |= {"forward_seconds": seconds, "embedded_gb": resident_gb("VmRSS"), "peak_gb": resident_gb("VmHWM")}
    if world.device.type == "cuda":
        found["peak_gpu_gb"] = torch.cuda.max_memory_allocated(world.device) / 1e9
    return found


def _read_bytes() -> int:
    """Bytes that this process has asked its files for, out of the page cache or not."""
    return int(Path("/proc/self/io").read_text(encoding="utf-8").split("rchar:")[1].split()[0])


def main() -> None:
    world = launch.start()
    found = measure(json.loads(sys.argv[1]), world)
    write_text(Path(sys.argv[2]) / f"rank-{world.rank}.json", json.dumps(found))
    launch.stop()


if __name__ == "__main__":
    main()
