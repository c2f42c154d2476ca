"""What a decoder learns of questions: the mean negative log-likelihood of the answers' tokens, and their mean divergence to a teacher's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megakd.models.vlm import IGNORED
from megakd.runtime import collectives
from megakd.runtime.launch import World

# Legend: B questions of a rank's part of the batch, or of one micro-batch; L tokens of a conversation.

NAME, DIVERGENCE = "answer", "answer_kl"


class AnswerLoss:
    """The losses over the answers of a global batch, of which every rank and every micro-batch holds a part."""

    def __init__(self, world: World) -> None:
        self._world = world

    def answer_tokens(self, labels_BL: Tensor) -> float:
        """Tokens of the global batch that are learned, over all ranks; at least 1. A collective: every rank calls it.

        The mean is over these, not over questions or ranks: a rank with long answers counts for more, as on a single rank.
        """
        own = (labels_BL != IGNORED).sum().to(torch.float32).reshape(1)
        return max(1.0, collectives.start_sum(own, self._world).read()[0])

    def losses(self, outputs: Mapping[str, Tensor], answer_tokens: float) -> dict[str, Tensor]:
        """`answer`, and `answer_kl` where there is a teacher; float32 scalars: this part's sum over the global count, times the ranks,
        whose losses DeepSpeed averages.

        outputs: `answer_nll` and perhaps `answer_kl`, each summed over the answer tokens of a question.
        """
        sums = {NAME: outputs["answer_nll"]} | ({DIVERGENCE: outputs[DIVERGENCE]} if DIVERGENCE in outputs else {})
        return {name: sum_B.float().sum() * (self._world.size / answer_tokens) for name, sum_B in sums.items()}
