"""A teacher's patch tokens brought to zero mean and unit variance, by statistics of the run's first batches.

"channel": each channel by itself. "phi_s": PHI-S (arXiv 2410.01680), a rotation after which every channel has the same variance, and one
factor that makes it 1; distances between tokens keep their proportions. A tower that is left as it is outweighs others by its scale alone.
Legend: T tokens of a batch, C their width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Kind = Literal["channel", "phi_s"]
_SMALLEST = 1e-6  # of a standard deviation, relative to the largest: a channel that never moves is left at zero


class Standardiser:
    """Statistics and the map that follows from them, kept in `state` under names that begin with `name`.

    They are those of the first `batches` calls, over all ranks and up to the current one: the map then stands. Every rank has the same.
    """

    def __init__(self, kind: Kind, batches: int, state: dict[str, Tensor], name: str, group: ProcessGroup | None) -> None:
        self._kind, self._batches, self._state, self._name, self._group = kind, batches, state, name, group

    def __call__(self, tokens_TC: Tensor, *, learn: bool = True) -> Tensor:
        """(T, C) float32, without gradient. A collective while statistics are taken. learn: count these tokens; without it a call with
        `learn` came before.
        """
        tokens_TC = tokens_TC.detach().float()
        seen = int(self._get("batches", torch.zeros((), dtype=torch.int64)))
        if learn and seen < self._batches:
            self._learn(tokens_TC, seen)
        centred_TC = tokens_TC - self._state[f"{self._name}.mean"]
        matrix = self._state[f"{self._name}.map"]
        return centred_TC * matrix if matrix.ndim == 1 else centred_TC @ matrix

    def _get(self, what: str, first: Tensor) -> Tensor:
        return self._state.get(f"{self._name}.{what}", first)

    def _learn(self, tokens_TC: Tensor, seen: int) -> None:
        """Sums in float64: of products of large means float32 would keep little."""
        wide_TC, width = tokens_TC.double(), tokens_TC.shape[1]
        products = wide_TC.square().sum(dim=0) if self._kind == "channel" else (wide_TC.T @ wide_TC).flatten()
        own = torch.cat([wide_TC.new_tensor([len(wide_TC)]), wide_TC.sum(dim=0), products])
        if self._group is not None:
            dist.all_reduce(own, group=self._group)
        sums = self._get("sums", torch.zeros_like(own)) + own
        mean_C, squares = sums[1 : width + 1] / sums[0], sums[width + 1 :] / sums[0]
        if self._kind == "channel":
            deviation_C = (squares - mean_C.square()).clamp(min=0).sqrt()
            found = torch.where(deviation_C > _SMALLEST * deviation_C.max(), 1 / deviation_C, 0.0)
        else:
            found = phi_s(squares.view(width, width) - mean_C[:, None] * mean_C)
        if self._group is not None:  # an eigenvector's last bits may differ from machine to machine
            dist.broadcast(found, dist.get_global_rank(self._group, 0), group=self._group)
        last = seen + 1 == self._batches
        kept = {"batches": torch.tensor(seen + 1), "mean": mean_C.float(), "map": found.float(), "sums": sums}
        self._state.update({f"{self._name}.{what}": value for what, value in kept.items() if what != "sums" or not last})
        if last:
            self._state.pop(f"{self._name}.sums", None)


def phi_s(covariance_CC: Tensor) -> Tensor:
    """(C, C) float64 on the covariance's device, to be multiplied from the right: U H' / sqrt(mean eigenvalue), H a Hadamard matrix.

    Raises ValueError for a width that none is known for.
    """
    eigenvalues_C, vectors_CC = torch.linalg.eigh(covariance_CC.cpu())
    largest_C = vectors_CC.abs().argmax(dim=0)
    vectors_CC = vectors_CC * vectors_CC.gather(0, largest_C[None]).sign()  # else a vector's sign would be an accident
    scale = eigenvalues_C.clamp(min=0).mean().sqrt()
    rotation_CC = vectors_CC @ hadamard(len(eigenvalues_C)).T
    return (rotation_CC / scale if scale > 0 else torch.zeros_like(rotation_CC)).to(covariance_CC.device)


def hadamard(width: int) -> Tensor:
    """(C, C) float64, orthogonal, all entries +-1/sqrt(C): Sylvester's doubling of Paley's first construction.

    Raises ValueError naming the width where neither gives one.
    """
    core = _core(width)
    matrix = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core - 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(width)


def _core(width: int) -> int:
    """The order to double: 1, or q + 1 for a prime q = 3 mod 4."""
    core = width
    while core > 1:
        prime = core % 4 == 0 and all((core - 1) % divisor for divisor in range(2, math.isqrt(core - 1) + 1))
        if prime:
            return core
        if core % 2:
            raise ValueError(f"no Hadamard matrix of {width} rows is known here; standardise = 'channel' needs none")
        core //= 2
    return 1


def _paley(prime: int) -> Tensor:
    """(q + 1, q + 1) of 1 and -1: the identity and the skew matrix of quadratic residues, bordered."""
    squares = {number * number % prime for number in range(1, prime)}
    difference = (torch.arange(prime)[None, :] - torch.arange(prime)[:, None]) % prime
    residues = torch.tensor([0.0, *(1.0 if number in squares else -1.0 for number in range(1, prime))], dtype=torch.float64)
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1.0, -1.0, residues[difference]
    return torch.eye(prime + 1, dtype=torch.float64) + skew
