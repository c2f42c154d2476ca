"""All that a step learns, as named and weighted losses: the recipe's objectives, its answers, or both on the same student."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megakd.models.embeddings import Embeddings
from megakd.models.student import embeddings
from megakd.objectives.answers import NAME, Answer
from megakd.objectives.set import ObjectiveSet


class Joint:
    """Either part may be None, not both. `weights` and `losses` have the objectives' names, and "answer"."""

    def __init__(self, distill: ObjectiveSet | None, answer: Answer | None) -> None:
        self.distill, self.answer = distill, answer
        self.weights = (distill.weights if distill else {}) | ({NAME: answer.weight} if answer else {})
        self.backends = distill.backends if distill else {}

    def losses(self, outputs: dict[str, Tensor], teachers: Sequence[Embeddings], answer_tokens: float, step: int) -> dict[str, Tensor]:
        """Unweighted float32 scalars by name, in the order of `weights`. outputs: those of the engine's module for this rank's part.

        answer_tokens: `Answer.answer_tokens` of the global batch; without answers it is not looked at.
        """
        found = self.distill.losses(embeddings(outputs), teachers, step) if self.distill else {}
        return found | ({NAME: self.answer.loss(outputs, answer_tokens)} if self.answer else {})

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        total = sum(self.weights[name] * loss for name, loss in losses.items())
        assert isinstance(total, Tensor)
        return total
