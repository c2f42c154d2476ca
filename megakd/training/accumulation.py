"""Exact gradient accumulation (GradCache, arXiv 2101.06983).

A loss over the similarity matrix of a batch is not the sum of the losses of its micro-batches. So all micro-batches are encoded once
without a graph, the loss of the whole batch is differentiated with respect to their outputs, and each micro-batch is encoded a second
time with a graph, to carry its part of that gradient back into the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GradCache:
    """leaves: the outputs of all micro-batches as those of one batch, which the loss is computed from and which collect its gradient."""

    def __init__(self, outputs: list[dict[str, Tensor]]) -> None:
        """outputs: of each micro-batch, in order, without a graph. Rows are concatenated; scalars are the same in all of them."""
        self._outputs = outputs
        joined = {
            name: value if value.ndim == 0 else torch.cat([micro_batch[name] for micro_batch in outputs])
            for name, value in outputs[0].items()
        }
        self.leaves = {name: value.detach().requires_grad_() for name, value in joined.items()}
        self._gradients: list[dict[str, Tensor]] = []

    def backward(self, loss: Tensor) -> None:
        """Differentiate `loss` with respect to `leaves` and cut the gradient into those of the micro-batches."""
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in self.leaves.items()}
        parts = {name: self._cut(name, gradient) for name, gradient in gradients.items()}
        self._gradients = [{name: part[number] for name, part in parts.items()} for number in range(len(self._outputs))]

    def surrogate(self, outputs: dict[str, Tensor], number: int) -> Tensor:
        """A scalar whose gradient is that of the loss: the sum over the outputs of micro-batch `number` of <output, dL/doutput>."""
        gradients = self._gradients[number]
        return torch.stack([(output.float() * gradients[name].float()).sum() for name, output in outputs.items()]).sum()

    def _cut(self, name: str, gradient: Tensor) -> list[Tensor]:
        """One part a micro-batch; of a scalar's gradient each has an equal share."""
        if gradient.ndim == 0:
            return [gradient / len(self._outputs)] * len(self._outputs)
        return list(gradient.split([len(micro_batch[name]) for micro_batch in self._outputs]))
