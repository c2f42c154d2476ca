"""Linear centred kernel alignment of two models' features, in memory that does not grow with the examples.

CKA = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)), whose HSIC of linear kernels is |X^T Y|^2, of centred features: Kornblith et al. 2019
(arXiv 1905.00414), equation 3. It is near 1 for any features where examples are few beside widths; the debiased one, with the unbiased
HSIC of Song et al. 2012 as Nguyen et al. 2021 take it (arXiv 2010.15327, equation 3), is not.

Legend: N examples, P and Q widths of the two models' features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over examples, in float64, from which CKA comes: features are added batch by batch, and never kept.

    first_P, second_Q: of features; first_PP, second_QQ, across_PQ: of their products.
    """

    count: int
    first_P: Tensor
    second_Q: Tensor
    first_PP: Tensor
    second_QQ: Tensor
    across_PQ: Tensor

    @classmethod
    def of(cls, first_NP: Tensor, second_NQ: Tensor) -> Moments:
        x, y = first_NP.detach().double(), second_NQ.detach().double()
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y)

    def add(self, other: Moments) -> None:
        self.count += other.count
        for name in ("first_P", "second_Q", "first_PP", "second_QQ", "across_PQ"):
            getattr(self, name).add_(getattr(other, name))

    def cpu(self) -> Moments:
        sums = (self.first_P, self.second_Q, self.first_PP, self.second_QQ, self.across_PQ)
        return Moments(self.count, *(one.cpu() for one in sums))

    def cka(self) -> float | None:
        """From 0 to 1; None where the features of a model do not vary."""
        covariances = (
            self.across_PQ - torch.outer(self.first_P, self.second_Q) / self.count,
            self.first_PP - torch.outer(self.first_P, self.first_P) / self.count,
            self.second_QQ - torch.outer(self.second_Q, self.second_Q) / self.count,
        )
        across, first, second = (float(covariance.square().sum()) for covariance in covariances)
        # What is left of features that are all alike is rounding.
        floor = [(1e-13 * float(products.diagonal().sum())) ** 2 for products in (self.first_PP, self.second_QQ)]
        if first <= floor[0] or second <= floor[1]:
            return None
        return across / math.sqrt(first * second)


def linear_cka(first_NP: Tensor, second_NQ: Tensor) -> float | None:
    """Of features as a whole; None where those of a model do not vary."""
    return Moments.of(first_NP, second_NQ).cka() if len(first_NP) else None


def debiased_cka(first_NP: Tensor, second_NQ: Tensor) -> float | None:
    """At most 1, around 0 for features that have nothing in common; None with fewer than four examples, or without variation."""
    if len(first_NP) < 4:
        return None
    # HSIC of linear kernels does not change with the mean, and is formed more exactly without it.
    x, y = (values - values.mean(0) for values in (first_NP.detach().double(), second_NQ.detach().double()))
    across, first, second = _unbiased_hsic(x, y), _unbiased_hsic(x, x), _unbiased_hsic(y, y)
    floor = [1e-26 * float(values.square().sum(1).sum()) ** 2 for values in (first_NP.double(), second_NQ.double())]
    if first <= floor[0] or second <= floor[1]:
        return None
    return across / math.sqrt(first * second)


def _unbiased_hsic(x: Tensor, y: Tensor) -> float:
    """HSIC_1 of Song et al. 2012, equation 5, times n (n - 3): of kernels with a zero diagonal, without forming them."""
    n, own_x_N, own_y_N = len(x), x.square().sum(1), y.square().sum(1)
    # rows of each kernel, summed without the diagonal
    rows_x_N, rows_y_N = x @ x.sum(0) - own_x_N, y @ y.sum(0) - own_y_N
    product = (x.T @ y).square().sum() - own_x_N @ own_y_N
    return float(product + rows_x_N.sum() * rows_y_N.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows_x_N @ rows_y_N))
