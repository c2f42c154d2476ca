"""Probes of a frozen tower's image features by labelled images: a linear classifier and the nearest neighbours' vote.

Both are scored twice: on what the tower makes of an image (`pooled`, unit rows) and on the mean of its patch tokens, which a decoder reads.

Linear: logistic regression by L-BFGS to convergence, as CLIP's (arXiv 2103.00020, appendix A.3), on channels standardised over the training
images; the L2 weight is that of a sweep which is best on a fifth of the training images, and the classifier is then fitted on all.
Nearest neighbours: DINO's weighted vote (arXiv 2104.14294, knn_classifier of its eval_knn.py): the k nearest training images by cosine,
each with the weight exp(cosine / T).

Legend: N training images, M test images, D width of the features, K classes, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.data.bad_samples import BadCounter, BadSample
from megakd.data.evaluation import SampleSet, labelled
from megakd.evaluation.encoder import Encoder
from megakd.evaluation.patch_features import MOST_BYTES, TokenPlan, features, plan_tokens
from megakd.recipe.evaluation import Probe
from megakd.runtime import collectives, watchdog
from megakd.runtime.console import with_progress
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.vqa.images import is_shards

L2 = tuple(10.0**power for power in range(1, -7, -1))  # of the sweep, beside the mean cross-entropy
_HELD_OUT = 5  # every so many'th training image, in a fixed shuffle, chooses among them
_STEPS, _TOLERANCE = 300, 1e-7
_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class ProbeSet:
    """Labelled images to learn from and to be scored on. lost: of each, samples that are in no row of its indexes."""

    settings: Probe
    train: SampleSet
    test: SampleSet
    lost: tuple[BadCounter, BadCounter]


def patterns(given: str, part: str) -> str:
    """Shards as they are given, or those of the part in a folder laid out as CLIP_benchmark's."""
    return given if is_shards(given) else f"{given.rstrip('/')}/{part}/*.tar"


def check_tower(sets: dict[str, ProbeSet], visual: nn.Module) -> None:
    """Raises ValueError for a tower, perhaps on torch's meta device, that does not give the block's tokens, and for too many images."""
    for name, one in sets.items():
        _plan(one, visual, f"evaluation.probe.{name}")


def _plan(one: ProbeSet, visual: nn.Module, key: str) -> TokenPlan:
    images = len(one.train) + len(one.test)
    plan = plan_tokens(visual, one.settings.layer, 1, images, key)
    if (size := 8 * images * plan.patches.width) > MOST_BYTES:
        raise ValueError(f"{key}: features of {images} images take {size / 2**30:.1f} GiB, more than {MOST_BYTES / 2**30:.0f}: take fewer")
    return plan


@dataclass(frozen=True)
class _Pictures:
    """The images of both parts, by number; the test's follow the training's."""

    one: ProbeSet

    def __len__(self) -> int:
        return len(self.one.train) + len(self.one.test)

    def read(self, indices: Sequence[int]) -> Iterator[tuple[str, bytes] | BadSample]:
        learned = len(self.one.train)
        for index in indices:
            shards, number = (self.one.train, index) if index < learned else (self.one.test, index - learned)
            (sample,) = shards.read_each([number], ("image",))
            yield sample if isinstance(sample, BadSample) else (sample.where, sample.members["image"])


def score_probes(sets: dict[str, ProbeSet], encoder: Encoder, world: World, interruptions: StopPoller) -> dict[str, dict[str, Any]]:
    """{set: {"linear": {"top1", "l2"}, "knn": {"top1"}, "patch_linear", "patch_knn", "images", ...}}, the same on every rank; a collective.

    Raises ValueError, on every rank, for labels that are none, when more than data.max_bad_fraction of a part cannot be read, and as
    `features`; Interrupted when a signal comes.
    """
    return {name: _score(one, f"evaluation.probe.{name}", encoder, world, interruptions) for name, one in sets.items()}


def _score(one: ProbeSet, key: str, encoder: Encoder, world: World, interruptions: StopPoller) -> dict[str, Any]:
    visual: Any = encoder.clip.visual
    found = features(_Pictures(one), _plan(one, visual, key), encoder, world, one.train.data, interruptions, key)
    learned = len(one.train)
    read = [
        [index for index in range(learned) if index not in found.unread],
        [index for index in range(learned, learned + len(one.test)) if index not in found.unread],
    ]
    for part, shards, lost, start in zip(("train", "test"), (one.train, one.test), one.lost, (0, learned), strict=True):
        bad = BadCounter(seen=len(shards))
        bad.merge(lost)
        for index in range(start, start + len(shards)):
            if index in found.unread:
                bad.add(found.unread[index].reason, str(found.unread[index]))
        bad.check(shards.data.max_bad_fraction, at_least=1, key=f"{key}.{part}")

    def results() -> dict[str, Any]:
        train_N = _labels(one.train, read[0])
        test_M = _labels(one.test, [index - learned for index in read[1]])
        classes_K, class_N = train_N.unique(return_inverse=True)
        if len(classes_K) < 2:
            raise ValueError(f"{key}.train: all images are of class {classes_K[0].item()}: there is nothing to learn")
        unknown = int((~torch.isin(test_M, classes_K)).sum())
        if len(test_M) and unknown == len(test_M):
            raise ValueError(f"{key}.test: no image is of a class that an image of its train has: the two number their classes differently")
        wrong = one.lost[1].total + len(one.test) - len(test_M)
        images = len(test_M) + wrong
        scores: dict[str, Any] = {}
        for kind, features_D in (("", found.pooled_ND), ("patch_", found.tokens_NPC.flatten(1))):
            train_ND, test_MD = (features_D[numbers].double().to(world.device) for numbers in read)
            watchdog.beat("evaluating")
            labels, l2 = linear(train_ND, class_N.to(world.device), test_MD)
            near = neighbours(train_ND, class_N.to(world.device), test_MD, one.settings.neighbours, one.settings.temperature)
            right = [(classes_K[given.cpu()] == test_M).sum().item() / images for given in (labels, near)]
            scores |= {f"{kind}linear": {"top1": right[0], "l2": l2}, f"{kind}knn": {"top1": right[1]}}
        return scores | {
            "images": images,
            "classes": len(classes_K),
            "learned": len(train_N),
            "neighbours": min(one.settings.neighbours, len(train_N)),
            "unreadable": wrong,
            "unknown": unknown,
        }

    return collectives.by_main(results, world)


def _labels(samples: SampleSet, numbers: Sequence[int]) -> Tensor:
    """(n,) int64. Raises ValueError for a sample without one."""
    labels = []
    for sample in samples.read_each(list(numbers), ("cls",)):
        if isinstance(sample, BadSample):
            raise ValueError(f"{sample}: its .cls member cannot be read")
        labels.append(labelled(sample, "cls"))
    return torch.tensor(labels, dtype=torch.int64)


def linear(train_ND: Tensor, class_N: Tensor, test_MD: Tensor) -> tuple[Tensor, float]:
    """(M,) classes by logistic regression, and the L2 weight that the held-out images chose; of equally good ones the largest."""
    mean_D, deviation_D = train_ND.mean(dim=0), train_ND.std(dim=0, unbiased=False)
    scale_D = torch.where(deviation_D > 1e-9, 1 / deviation_D.clamp(min=1e-9), 0.0)
    train_ND, test_MD = (train_ND - mean_D) * scale_D, (test_MD - mean_D) * scale_D
    classes = int(class_N.max()) + 1
    order = torch.randperm(len(train_ND), generator=torch.Generator().manual_seed(0)).to(train_ND.device)
    held, kept = order[::_HELD_OUT], order[torch.arange(len(order), device=order.device) % _HELD_OUT != 0]
    best, most, start = L2[0], -1, None
    for l2 in with_progress(L2, "evaluating probes (linear)", "strengths"):
        start = fit(train_ND[kept], class_N[kept], classes, l2, start)
        right = int((predicted(train_ND[held], *start) == class_N[held]).sum())
        if right > most:
            best, most = l2, right
    return predicted(test_MD, *fit(train_ND, class_N, classes, best)), best


def fit(features_ND: Tensor, class_N: Tensor, classes: int, l2: float, start: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(K, D) weights and (K,) biases that minimise the mean cross-entropy + l2 / 2 |weights|^2, from `start` or from zeros."""
    weight_KD = features_ND.new_zeros(classes, features_ND.shape[1]) if start is None else start[0].clone()
    bias_K = features_ND.new_zeros(classes) if start is None else start[1].clone()
    for parameter in (weight_KD, bias_K):
        parameter.requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [weight_KD, bias_K], max_iter=_STEPS, tolerance_grad=_TOLERANCE, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        watchdog.beat("evaluating")  # a fit on a million images takes minutes
        value = F.cross_entropy(features_ND @ weight_KD.T + bias_K, class_N) + l2 / 2 * weight_KD.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    return weight_KD.detach(), bias_K.detach()


def predicted(features_MD: Tensor, weight_KD: Tensor, bias_K: Tensor) -> Tensor:
    return (features_MD @ weight_KD.T + bias_K).argmax(dim=1)


def neighbours(train_ND: Tensor, class_N: Tensor, test_MD: Tensor, most: int, temperature: float) -> Tensor:
    """(M,) classes by the weighted vote of the `most` nearest, or of all where there are fewer; of equal votes the lower class."""
    train_ND, test_MD = F.normalize(train_ND, dim=1), F.normalize(test_MD, dim=1)
    classes, chosen = int(class_N.max()) + 1, [class_N.new_zeros(0)]
    for start in with_progress(range(0, len(test_MD), _QUERIES_AT_ONCE), "evaluating probes (neighbours)", "pieces"):
        cosine_mk, near_mk = (test_MD[start : start + _QUERIES_AT_ONCE] @ train_ND.T).topk(min(most, len(train_ND)), dim=1)
        votes_mkK = F.one_hot(class_N[near_mk], classes) * (cosine_mk / temperature).exp().unsqueeze(2)
        chosen.append(votes_mkK.sum(dim=1).argmax(dim=1))
    return torch.cat(chosen)
