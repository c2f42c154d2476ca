"""The student in DeepSpeed's hands: bytes of weights, gradients, optimizer and buffers on one rank, and bytes on the wire, by ZeRO stage.

Each term was found by counting the live storages of DeepSpeed 0.19.8 through a step (tests/planning/test_zero_memory.py counts again).
Legend: P trained parameters, W ranks, e bytes of the computing dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from megakd.runtime.ds_config import DsConfig
from megakd.runtime.wire import Wire, gathered, reduced, scattered

# fp32 master copy (ZeRO only) and AdamW's two moments
MASTER, MOMENTS = 4, 8
AVERAGE = 4  # of `optim.ema`
# Elements: DeepSpeed's bucket for gradients, without ZeRO and by default with it
BUCKET = 500_000_000


@dataclass(frozen=True)
class Settings:
    """What of a resolved DeepSpeed configuration decides memory and traffic. Buckets and the limits of stage 3 in elements.

    sums_in_fp32: gradients of micro-batches of bf16 add up in float32. group: ranks over which hpZ spreads a second copy of the weights, 1
    without it.
    """

    stage: int
    element: int
    reduce_bucket: int
    prefetch: int
    persistence: int
    reuse: int
    live: int
    overlap: bool
    offload_optimizer: bool
    offload_weights: bool
    sums_in_fp32: bool
    group: int = 1

    @classmethod
    def of(cls, raw: dict[str, Any], element: int) -> Settings:
        config = DsConfig(raw)
        zero, stage = config.zero, config.stage
        return cls(
            stage, element, int(zero.get("reduce_bucket_size", BUCKET)),
            int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
            int(zero.get("stage3_param_persistence_threshold", 100_000)), int(zero.get("stage3_max_reuse_distance", 1_000_000_000)),
            int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
            bool(zero.get("overlap_comm", stage == 3)), config.offloads_optimizer, config.offloads_weights,
            element < MASTER and config.get("data_types", {}).get("grad_accum_dtype") == "fp32", config.group,
        )  # fmt: skip


@dataclass(frozen=True)
class Held:
    """Bytes on one rank. weights, optimizer and standing (gradients and buffers between steps) are there always.

    gathered: full weights that ZeRO-3 holds between forward and backward. gradients: at the end of the backward, beyond `standing`.
    reducing: extra while they are averaged. updating: peak of the update beyond weights and optimizer. host: bytes in CPU memory.
    keeps: whether each gradient stays whole until the update.
    """

    weights: int
    optimizer: int
    standing: int
    gathered: int
    gradients: int
    reducing: int
    updating: int
    host: int
    keeps: bool


def held(sizes: tuple[int, ...], ranks: int, of: Settings, frozen: tuple[int, ...] = (), *, averages: bool = False) -> Held:
    """Bytes of a student whose trained parameters have these numbers of elements, and of weights beside them that are not trained.

    averages: of the weights that are trained, which lie with the moments.
    """
    found = _partitioned(sizes, ranks, of, frozen) if of.stage == 3 else _replicated(sizes, ranks, of)
    if averages:
        shares = sum(math.ceil(size / ranks) for size in sizes) if of.stage == 3 else math.ceil(sum(sizes) / (ranks if of.stage else 1))
        where = "host" if of.offload_optimizer else "optimizer"
        found = replace(found, **{where: getattr(found, where) + AVERAGE * shares})
    if of.stage < 3:
        found = replace(found, weights=found.weights + of.element * sum(frozen))
    return _with_sums(found, sum(sizes), ranks, of) if of.sums_in_fp32 and not of.offload_optimizer else found


def _with_sums(found: Held, whole: int, ranks: int, of: Settings) -> Held:
    """Where gradients add up in float32: at stage 1 all of them, beside the pieces' own; else in a rank's share, which is wider then."""
    share, wider = math.ceil(whole / ranks), MASTER - of.element
    if of.stage == 1:
        reducing = MASTER * min(whole, BUCKET)  # averaged through a flat copy
        return replace(found, standing=found.standing + MASTER * whole, reducing=reducing, updating=MASTER * share)
    if of.stage == 2:
        return replace(found, gradients=MASTER * share, updating=(MASTER + of.element) * share)
    return replace(found, standing=found.standing + wider * share, updating=MASTER * share)


def _replicated(sizes: tuple[int, ...], ranks: int, of: Settings) -> Held:
    whole, e = sum(sizes), of.element
    if of.stage == 0:
        # DeepSpeed averages over several ranks through a flat copy, which it makes of up to 500 million gradients at a time.
        copied = e * min(whole, BUCKET) if ranks > 1 else 0
        return Held(e * whole, MOMENTS * whole, 0, 0, e * whole, copied, e * whole, 0, True)
    share = math.ceil(whole / ranks)
    bucket = e * min(of.reduce_bucket, whole)
    optimizer = (MASTER + MOMENTS) * share
    own = e * share
    # The update takes the gradients' partition as a list, flat, and widened; in fp32 the last two are one.
    updating = (own + own + MASTER * share) if e != MASTER else own + own
    keeps = of.stage == 1
    gradients = e * whole if keeps else own
    reducing = own + bucket if keeps else (4 if of.overlap else 2) * bucket
    if not of.offload_optimizer:
        return Held(e * whole, optimizer, 0, 0, gradients, reducing, updating, 0, keeps)
    # On the host: master, moments, gradients in fp32 and a copy of the weights' partition; on the device one parameter's gradient.
    host = optimizer + MASTER * share + e * share
    return Held(e * whole, 0, e * max(sizes), 0, e * whole if keeps else 0, reducing, e * max(sizes), host, keeps)


def _partitioned(sizes: tuple[int, ...], ranks: int, of: Settings, frozen: tuple[int, ...]) -> Held:
    e = of.element
    share = sum(math.ceil(size / ranks) for size in sizes)
    persistent = sum(size for size in (*sizes, *frozen) if size < of.persistence)
    gatherable = sum(sizes) + sum(frozen) - persistent
    bucket = e * min(of.reduce_bucket, sum(sizes))
    every = share + sum(math.ceil(size / ranks) for size in frozen)
    # hpZ: what a rank keeps of its group's own copy, of which each part is ranks / group of the shares
    second = every * ranks // of.group if of.group > 1 else 0
    weights, optimizer, gradients = e * (every + second), (MASTER + MOMENTS) * share, e * share
    gathered = e * kept(gatherable, of) + e * persistent
    updating = MASTER * share if e == MASTER else (e + MASTER) * share
    standing = gradients + bucket
    host = 0
    if of.offload_optimizer:
        host += optimizer + MASTER * share
        optimizer, updating, standing = 0, 0, bucket
    if of.offload_weights:
        host += weights
        weights = 0
    return Held(weights, optimizer, standing, gathered, 0, 2 * bucket, updating, host, False)


def traffic(
    sizes: tuple[int, ...],
    ranks: int,
    of: Settings,
    forwards: int,
    backwards: int,
    frozen: tuple[int, ...] = (),
    *,
    traced: bool = True,
) -> tuple[Wire, Wire]:
    """What one rank sends in a step: among all ranks, and in its group of hpZ alone.

    Stage 0: gradients all-reduced. 1, 2: all-reduced by bucket (DeepSpeed's default), then updated weights gathered; stage 2 in every
    backward. 3: weights gathered in every forward and, where they were released, every backward (`regathered`); gradients scattered in
    every backward. Its small weights stay on every rank and are gathered once, each by itself, after the update. frozen: sizes of what is
    not trained, which is gathered alone. traced: as for `regathered`.
    """
    numel, e = sum(sizes), of.element
    if of.stage == 0:
        return reduced(e * numel, ranks, math.ceil(numel / BUCKET)), Wire()
    if of.stage < 3:
        rounds, kind = (1, MASTER if of.sums_in_fp32 else e) if of.stage == 1 else (backwards, e)
        # a gather for each group of AdamW, with weight decay and without
        return reduced(kind * numel * rounds, ranks, math.ceil(numel / of.reduce_bucket) * rounds) + gathered(e * numel, ranks, 2), Wire()
    small = [size for size in (*sizes, *frozen) if size < of.persistence]
    large = numel + sum(frozen) - sum(small)
    sent = gathered(e * sum(small), ranks, len(small)) + gathered(e * large * forwards, ranks, _fetches(large, of) * forwards)
    sent += scattered(e * numel * backwards, ranks, math.ceil(numel / of.reduce_bucket) * backwards)
    again = regathered(large, of, traced=traced)
    near = gathered(e * again * backwards, of.group if of.group > 1 else ranks, _fetches(again, of) * backwards)
    return (sent, near) if of.group > 1 else (sent + near, Wire())


def _fetches(elements: int, of: Settings) -> int:
    return math.ceil(elements / max(1, of.prefetch))


def kept(large: int, of: Settings) -> int:
    """Elements that ZeRO-3 keeps gathered from the forward to the backward, of those that it partitions.

    Those to which the backward comes within the reuse distance, which counts each twice. And what has been fetched ahead when the queue
    turns into the backward: every module that starts fetches a bucket more, so that is soon all that may live at once.
    """
    return min(large, max(of.reuse // 2 + of.prefetch, of.live if of.prefetch else 0))


def regathered(large: int, of: Settings, *, traced: bool) -> int:
    """Elements that ZeRO-3 gathers once more in a backward, of those that it partitions.

    traced: whether DeepSpeed knows the order of modules. Forwards without a backward, as those that come first where losses need all
    micro-batches at once, make it forget: then nothing is fetched ahead, and nothing stays.
    """
    return large - kept(large, of) if traced else large
