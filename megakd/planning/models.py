"""What the recipe's models cost, from `meta`: bytes of their weights, bytes and FLOPs of a forward and a backward.

Nothing is downloaded and no weight exists: a model of 5 billion parameters is measured in some seconds.
Legend: B pairs of a micro-batch, L tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megakd.data.transforms import input_size, normalise
from megakd.models import clip
from megakd.models.heads import ObjectiveHead
from megakd.models.int8 import matmul
from megakd.models.int8.convert import quantise
from megakd.models.patches import Read, TowerReader
from megakd.models.places import freeze
from megakd.models.student import Student
from megakd.planning import vlm
from megakd.planning.memory_tracker import MemoryTracker, fused_attention
from megakd.planning.zero import Settings
from megakd.recipe import Model, Recipe, Teacher, chain
from megakd.runtime.precision import Precision
from megakd.runtime.zero3 import gathered_together
from megakd.teachers.base import TowerForm
from megakd.teachers.sharded import text_tower

META = torch.device("meta")
# A Linear multiplies two operands, and its gradient is two products of the same size.
BACKWARD_FLOPS = 2


@dataclass(frozen=True)
class Tower:
    """One tower of a frozen teacher. wide: bf16, or fp32 on a CPU. flops: of one sample."""

    wide: TowerForm
    int8: TowerForm
    flops: int


@dataclass(frozen=True)
class TeacherCost:
    """text: None of a teacher that sees images alone.

    input: bytes of normalised pixels of the rank's whole batch and, while they are made, of the temporaries."""

    name: str
    image: Tower
    text: Tower | None
    width: int
    element: int
    input: int
    raw: int


@dataclass(frozen=True)
class Shares:
    """Of one rank: pairs of a micro-batch and of a step, questions of both; 0 where there are none."""

    micro: int
    local: int
    asked: int
    asked_local: int


@dataclass(frozen=True)
class StudentCost:
    """A training step of one micro-batch. Bytes beside weights, by place in the step.

    sizes: elements of each trained parameter. forward: peak; saved: what the backward will need; backward: peak, with gradients that
    stay or that leave as soon as they are there, as asked for. input, raw: as in `TeacherCost`.
    flops: of one pair's forward; pair_backward: how often its backward costs as much, less where parts are frozen; recomputed: whether
    the backward runs the blocks once more.
    frozen: elements of each weight that the engine holds and does not train. asked_flops: of one question's forward; asked_backward: how
    often its backward costs as much. image_tokens: of one image in a question. features: of what heads give of patch tokens. averaged:
    whether there is an average of each trained weight.
    """

    name: str
    sizes: tuple[int, ...]
    element: int
    forward: int
    saved: int
    backward: int
    input: int
    raw: int
    flops: int
    recomputed: bool
    width: int
    frozen: tuple[int, ...]
    asked_flops: int
    asked_backward: int
    image_tokens: int
    features: int = 0
    pair_backward: float = BACKWARD_FLOPS
    averaged: bool = False

    @property
    def numel(self) -> int:
        return sum(self.sizes)


def describe(settings: Model, role: str) -> clip.ModelSpec:
    """As `clip.describe`, but needs neither weights nor a tokenizer. A teacher that a recipe trains first is that recipe's student.

    Raises ValueError for an unknown name, with the nearest, and for an incomplete architecture.
    """
    settings = chain.model(settings, role)
    config, preprocess = clip.configuration(settings, role)
    return clip.ModelSpec(role, settings, config, preprocess, _no_tokenizer)


def _no_tokenizer(texts: list[str]) -> Tensor:
    raise AssertionError("a plan reads no text")


def name_of(settings: Model) -> str:
    return settings.model or "own architecture"


def _build(description: clip.ModelSpec, precision: Precision) -> clip.ClipModel:
    with META:
        return clip.build(description, META, precision, load_weights=False)


def teacher(
    settings: Model,
    micro: int,
    local: int,
    precision: Precision,
    partition: Settings,
    device: torch.device | None = None,
    reads: Collection[Read] = (),
) -> TeacherCost:
    """Cost of a teacher on `local` pairs a rank in pieces of `micro`.

    partition: how DeepSpeed would partition it. device: whose way of multiplying int8 is counted; None widens the matrices. reads: what
    objectives read of its vision tower. Raises ValueError for what it does not have.
    """
    description = describe(settings, "teacher")
    built = _build(description, precision)
    clip, dtype = built.clip.eval().requires_grad_(False), built.dtype
    pixels, tokens = _inputs(built, micro, dtype)
    flops = [_flops(call, [given[:1]]) for call, given in _calls(clip, pixels, tokens)]
    wide = _forms(clip, pixels, tokens, partition, reads)
    int8 = settings if isinstance(settings, Teacher) else Teacher(model="any", pretrained="any")
    quantise(clip, threshold=int8.outlier_threshold, product=_product(int8, device), migrated=int8.calibration > 0)
    image, *texts = (
        Tower(one, other, count) for one, other, count in zip(wide, _forms(clip, pixels, tokens, partition, reads), flops, strict=True)
    )
    text = texts[0] if texts else None
    made, kept, raw = _input_bytes(built.preprocess, local, dtype)
    return TeacherCost(name_of(settings), image, text, description.width, dtype.itemsize, max(made, kept), raw + tokens[0].nbytes * local)


def _product(settings: Teacher, device: torch.device | None) -> matmul.Product:
    """Where the job will run: this machine may lack what that one has."""
    if device is None:
        return "dequantise"
    if settings.int8_product != "auto":
        return settings.int8_product
    return "bitsandbytes" if device.type == "cuda" else matmul.choose(device)


def _calls(clip: Any, pixels: Tensor, tokens: Tensor) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Of the towers that it has, the image's first."""
    return [(clip.encode_image, pixels), *([(clip.encode_text, tokens)] if hasattr(clip, "encode_text") else [])]


def _forms(clip: Any, pixels: Tensor, tokens: Tensor, partition: Settings, reads: Collection[Read]) -> list[TowerForm]:
    """Of the image tower, and of the text tower where there is one, as they are now."""
    forms = []
    calls = _calls(clip, pixels, tokens)
    towers = [clip.visual, *(text_tower(clip) for _ in calls[1:])]
    for tower, (call, given) in zip(towers, calls, strict=True):
        watch = MemoryTracker("meta")
        watch.ignore([*clip.parameters(), *clip.buffers(), given])
        with torch.no_grad(), fused_attention(), watch, TowerReader(clip.visual, reads if tower is clip.visual else ()):
            call(given)
        forms.append(_form(tower, watch.peak, partition))
    return forms


def student(
    recipe: Recipe, heads: Mapping[str, ObjectiveHead], batch: Shares, *, bf16: bool, drop: bool, captions: bool = True
) -> StudentCost:
    """Cost of what the recipe trains: the student with its heads, the decoder, or both; activation checkpointing included.

    heads: on meta. drop: gradients leave as soon as they are there. captions: False where none is read, and the text tower does nothing.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    built = None if (settings := chain.with_text(recipe)) is None else _build(describe(settings, "student"), "fp32")
    recomputed = recipe.student is not None and recipe.student.activation_checkpointing
    width, name = 0, "no student"
    if built is not None and recipe.student is not None:
        width, name = built.description.width, name_of(recipe.student)
    with META:
        student = Student(None if built is None else built.clip, heads, recipe.student.max_scale if recipe.student else 1.0)
        module = (vlm.learner(recipe, student) if recipe.decoder else student).train().to(dtype)
    if recipe.student is not None:
        freeze(module.answering if isinstance(module, vlm.Learner) else module, recipe.student.freeze)

    def inputs(pairs: int, questions: int) -> list[Any]:
        given: list[Any] = [None, None] if built is None or not pairs else [*_inputs(built, pairs, dtype, captions)]
        reading = {name: head.teacher_width for name, head in heads.items() if head.teacher_width}
        given.append({name: [torch.empty(pairs, width, dtype=dtype, device=META) for _ in range(2)] for name, width in reading.items()})
        if not isinstance(module, vlm.Learner):
            return given
        ids_BL = torch.empty(questions, module.length, dtype=torch.int64, device=META)
        return [*given, None if built is None else _inputs(built, questions, dtype)[0], ids_BL]

    flops, asked_flops = _flops(module, inputs(1, 1)), 0
    if batch.asked:
        asked_flops = _flops(module, inputs(0, 1))
        flops = flops - asked_flops if batch.micro else 0
    frozen_in_part = recipe.student is not None and bool(recipe.student.freeze)
    pair_backward = _backward_flops(module, inputs(1, 0)) if frozen_in_part and batch.micro else BACKWARD_FLOPS
    if recomputed and built is not None:
        built.clip.set_grad_checkpointing(True)  # type: ignore[operator]
    forward, saved, backward, features = _step(module, lambda: inputs(batch.micro, batch.asked), drop=drop)
    given = inputs(batch.local, batch.asked_local)
    made = raw = 0
    if built is not None:
        made, _, raw = _input_bytes(built.preprocess, batch.local + batch.asked_local, dtype)
    raw += sum(one.nbytes for one in given if isinstance(one, Tensor) and one.dtype == torch.int64)
    trained, frozen = ([p.numel() for p in module.parameters() if p.requires_grad is learned] for learned in (True, False))
    full = recipe.decoder is not None and recipe.decoder.adapt == "full"
    return StudentCost(
        name, tuple(trained), dtype.itemsize, forward, saved, backward, made, raw, flops, recomputed, width,
        tuple(frozen), asked_flops, BACKWARD_FLOPS if full else BACKWARD_FLOPS - 1,
        module.answering.decoder.image_tokens if isinstance(module, vlm.Learner) else 0, features,
        pair_backward, recipe.optim.ema is not None,
    )  # fmt: skip


def _inputs(built: clip.ClipModel, count: int, dtype: torch.dtype, captions: bool = True) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, H, W) and tokens (B, L), or (B, 0) without captions, on meta."""
    tokens_BL = torch.empty(count, built.description.context_length if captions else 0, dtype=torch.int64, device=META)
    return torch.empty(count, 3, *input_size(built.preprocess), dtype=dtype, device=META), tokens_BL


def _input_bytes(preprocess: PreprocessCfg, local: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Normalising the pixels of a rank: bytes at the peak, bytes that stay, and bytes of the pixels as the loader brings them."""
    watch = MemoryTracker("meta")
    raw = torch.empty(local, 3, *input_size(preprocess), dtype=torch.uint8, device=META)
    watch.ignore([raw])
    with watch:
        view = normalise(raw, preprocess, dtype)
    return watch.peak, view.nbytes, raw.nbytes


def _form(tower: nn.Module, activations: int, partition: Settings) -> TowerForm:
    # The limit is the one that `runtime.partition.Partitioned` gives.
    groups = [list(group.parameters()) for group in gathered_together(tower, partition.live // 2)]
    small = [parameter for parameter in tower.parameters() if parameter.numel() < partition.persistence]
    several = [group for group in groups if len(group) > 1]
    return TowerForm(
        sum(parameter.numel() for parameter in tower.parameters()),
        sum(tensor.nbytes for tensor in (*tower.parameters(), *tower.buffers())),
        activations,
        sum(tensor.nbytes for tensor in (*tower.buffers(), *small)),
        max((sum(parameter.nbytes for parameter in group) for group in several), default=0),
        max((group[0].nbytes for group in groups if len(group) == 1), default=0),
        max((parameter.numel() for group in several for parameter in group), default=0),
        sum(any(parameter.numel() >= partition.persistence for parameter in group) for group in groups),
    )


def _step(module: nn.Module, inputs: Callable[[], Sequence[Any]], *, drop: bool) -> tuple[int, int, int, int]:
    """Bytes beside weights: peak of the forward, held after it, peak of the backward; and of the outputs (B, h, w, C)."""
    watch = MemoryTracker("meta")
    watch.ignore([*module.parameters(), *module.buffers()])
    dropped = [parameter for parameter in module.parameters() if drop and parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in dropped]
    with fused_attention(), watch:
        outputs = module(*inputs())
        forward, saved = watch.peak, watch.live
        watch.restart()
        moved = [value for value in outputs.values() if value.requires_grad]
        torch.autograd.backward(moved, [torch.empty_like(value) for value in moved])
    for hook in hooks:
        hook.remove()
    module.zero_grad(set_to_none=True)
    return forward, saved, watch.peak, sum(value.nbytes for value in outputs.values() if value.ndim == 4)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _backward_flops(module: nn.Module, one: Sequence[Any]) -> float:
    """Of one pair's backward, as a multiple of its forward's."""
    with FlopCounterMode(display=False) as counter:
        outputs = module(*one)
        forward = int(counter.get_total_flops())
        moved = [value for value in outputs.values() if value.requires_grad]
        torch.autograd.backward(moved, [torch.empty_like(value) for value in moved])
        backward = int(counter.get_total_flops()) - forward
    module.zero_grad(set_to_none=True)
    return backward / forward


def _flops(call: Callable[..., object], one: Sequence[Any]) -> int:
    """Of one sample's forward: 2 a multiply-add of products and convolutions, attention's included (as products, on meta)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*one)
    return int(counter.get_total_flops())
