"""Objectives over the similarity matrix, each written once more: whole matrices, loops over their lines, no panels and no ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, huber_loss, normalize

from megakd.models.embeddings import Embeddings
from megakd.objectives.base import Objective, StepContext
from megakd.objectives.set import build
from megakd.recipe import Objectives
from megakd.recipe import load as recipes

# Legend: N pairs, D width.
CPU = torch.device("cpu")


def objective(recipe_file: str, name: str, *overrides: str) -> Objective:
    """The objective `name` alone, of a recipe with these further settings."""
    others = [f"objectives.{other}={float(other == name)}" for other in Objectives.model_fields]
    (built,) = build(recipes.load(recipe_file, [*others, *overrides])[0], CPU)
    return built


def pairs(count: int, width: int, scale: float, seed: int, dtype: torch.dtype = torch.float64) -> Embeddings:
    """Pairs that agree about as far as a trained model's."""
    generator = torch.Generator().manual_seed(seed)
    image_ND, noise_ND = (torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2))
    text_ND = normalize(image_ND, dim=-1) + normalize(noise_ND, dim=-1)
    return Embeddings(normalize(image_ND, dim=-1).to(dtype), normalize(text_ND, dim=-1).to(dtype), torch.tensor(scale, dtype=dtype))


def trained(student: Embeddings) -> Embeddings:
    """The same numbers as leaves that collect gradients."""
    return student._replace(**{name: getattr(student, name).detach().clone().requires_grad_() for name in ("image", "text", "scale")})


def gradients(student: Embeddings) -> list[Tensor]:
    """Of image, text and scale; zeros for what the loss does not reach."""
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in student[:3]]


class Outcome(NamedTuple):
    loss: Tensor
    gradients: list[Tensor]


def measure(loss_of: Callable[[Embeddings, Sequence[Embeddings]], Tensor], student: Embeddings, teachers: Sequence[Embeddings]) -> Outcome:
    """The loss, and what its gradient is times 2.5."""
    leaves = trained(student)
    loss = loss_of(leaves, teachers)
    (2.5 * loss).backward()
    return Outcome(loss.detach(), gradients(leaves))


def called(built: Objective) -> Callable[[Embeddings, Sequence[Embeddings]], Tensor]:
    return lambda student, teachers: next(iter(built(StepContext(student, teachers)).values()))


def _logits(model: Embeddings) -> Tensor:
    return model.scale * model.image @ model.text.T


def _softmax(values_N: Tensor) -> Tensor:
    powers_N = (values_N - values_N.max()).exp()
    return powers_N / powers_N.sum()


def _correlation(a_N: Tensor, b_N: Tensor) -> Tensor:
    a_N, b_N = a_N - a_N.mean(), b_N - b_N.mean()
    return (a_N * b_N).sum() / (a_N.square().sum() * b_N.square().sum()).sqrt()


def dist(student: Embeddings, teacher: Embeddings, temperature: float, beta: float, gamma: float) -> Tensor:
    """DIST of the image-to-text softmaxes and of the text-to-image ones, averaged."""
    directions = []
    for a_NN, b_NN in ((_logits(student), _logits(teacher)), (_logits(student).T, _logits(teacher).T)):
        p_NN, q_NN = (torch.stack([_softmax(line) for line in logits / temperature]) for logits in (a_NN, b_NN))
        inter = 1 - torch.stack([_correlation(p, q) for p, q in zip(p_NN, q_NN, strict=True)]).mean()
        intra = 1 - torch.stack([_correlation(p, q) for p, q in zip(p_NN.T, q_NN.T, strict=True)]).mean()
        directions.append(temperature**2 * (beta * inter + gamma * intra))
    return (directions[0] + directions[1]) / 2


def _kl(q: Tensor, p: Tensor) -> Tensor:
    return (q * (q.log() - p.log())).sum()


def dkd(student: Embeddings, teacher: Embeddings, temperature: float, alpha: float, beta: float) -> Tensor:
    losses = []
    for a_NN, b_NN in ((_logits(student), _logits(teacher)), (_logits(student).T, _logits(teacher).T)):
        for own, (a_N, b_N) in enumerate(zip(a_NN / temperature, b_NN / temperature, strict=True)):
            p_N, q_N = _softmax(a_N), _softmax(b_N)
            others = [place for place in range(len(a_N)) if place != own]
            target = _kl(torch.stack([q_N[own], 1 - q_N[own]]), torch.stack([p_N[own], 1 - p_N[own]]))
            losses.append(alpha * target + beta * _kl(_softmax(b_N[others]), _softmax(a_N[others])))
    return temperature**2 * torch.stack(losses).mean()


def standardised(student: Embeddings, teacher: Embeddings, temperature: float) -> Tensor:
    losses = []
    for a_NN, b_NN in ((_logits(student), _logits(teacher)), (_logits(student).T, _logits(teacher).T)):
        for lines in zip(a_NN, b_NN, strict=True):
            p_N, q_N = (_softmax((line - line.mean()) / line.std(correction=0) / temperature) for line in lines)
            losses.append(_kl(q_N, p_N))
    return temperature**2 * torch.stack(losses).mean()


def gradient(student: Embeddings, teacher: Embeddings) -> Tensor:
    """By torch's derivative of InfoNCE, itself differentiated for the student."""
    total = torch.zeros((), dtype=torch.float64)
    sides = []
    for model in (student, teacher):
        leaves = [side if side.requires_grad else side.detach().clone().requires_grad_() for side in (model.image, model.text)]
        logits_NN, labels_N = _logits(model._replace(image=leaves[0], text=leaves[1])), torch.arange(len(leaves[0]))
        infonce = (cross_entropy(logits_NN, labels_N) + cross_entropy(logits_NN.T, labels_N)) / 2
        sides.append(torch.autograd.grad(infonce * len(leaves[0]), leaves, create_graph=model is student))
    for own_ND, taught_ND in zip(*sides, strict=True):
        total = total + (own_ND - taught_ND).square().sum(1).mean() / 2
    return total


def rkd(student: Embeddings, teacher: Embeddings, distance: float, angle: float, on: str = "both") -> Tensor:
    """Over all pairs of unlike points and all triples of them; a mean over N^2 and N^3 as in the authors' code."""
    losses = []
    for side in ("image", "text") if on == "both" else (on,):
        own_ND, taught_ND = getattr(student, side), getattr(teacher, side)
        places = range(len(own_ND))
        two = [(i, j) for i in places for j in places if i != j]
        d, e = (torch.stack([(x[i] - x[j]).square().sum().sqrt() for i, j in two]) for x in (own_ND, taught_ND))
        three = [(i, j, k) for i, j in two for k in places if k not in (i, j)]
        rays = [{(i, j): (x[j] - x[i]) / (x[j] - x[i]).square().sum().sqrt() for i, j in two} for x in (own_ND, taught_ND)]
        own, taught = (torch.stack([of[i, j] @ of[i, k] for i, j, k in three]) for of in rays)
        of_distances = huber_loss(d / d.mean(), e / e.mean(), reduction="sum") / len(places) ** 2
        losses.append(distance * of_distances + angle * huber_loss(own, taught, reduction="sum") / len(places) ** 3)
    return torch.stack(losses).mean()
