"""What a decoder learns of questions: one loss, the mean negative log-likelihood of the answers' tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megakd.models.vlm import IGNORED
from megakd.runtime import collectives
from megakd.runtime.launch import World

# Legend: B questions of a rank's part of the batch, or of one micro-batch; L tokens of a conversation.

NAME = "answer"


class AnswerLoss:
    """The loss over the answers of a global batch, of which every rank and every micro-batch holds a part."""

    def __init__(self, weight: float, world: World) -> None:
        self.weight, self._world = weight, world

    def answer_tokens(self, labels_BL: Tensor) -> float:
        """Tokens of the global batch that are learned, over all ranks; at least 1. A collective: every rank calls it.

        The mean is over these, not over questions or ranks: a rank with long answers counts for more, as on a single rank.
        """
        own = (labels_BL != IGNORED).sum().to(torch.float32).reshape(1)
        return max(1.0, collectives.start_sum(own, self._world).read()[0])

    def loss(self, outputs: Mapping[str, Tensor], answer_tokens: float) -> Tensor:
        """float32 scalar: this part's sum over the global count, times the ranks, whose losses DeepSpeed averages."""
        return outputs["answer_nll"].float().sum() * (self._world.size / answer_tokens)
