"""What DeepSpeed's engine holds where a decoder learns to answer: the student, where there is one, and the decoder, in one module.

Both losses of a step come from one forward: KD from pairs of images and texts, answers from questions about other images, through
the same vision tower. Where no objective is active the pairs are absent; where there is no student (blind) so is the tower.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megakd.models.patches import patch_tokens
from megakd.models.student import Student
from megakd.models.vlm.decoder import Decoder

# Legend: B questions, L tokens of a conversation, V patches of the tower, C its width.


class QuestionInputs(NamedTuple):
    """Questions as the decoder takes them. pixels: (B, 3, H, W), normalised; None without a tower. The rest is (B, L)."""

    pixels: Tensor | None
    ids_BL: Tensor
    attend_BL: Tensor
    image_mask_BL: Tensor
    labels_BL: Tensor

    def split(self, pieces: int) -> list[QuestionInputs]:
        """As many parts as there are micro-batches, whose sizes differ by one at most."""
        columns = [[None] * pieces if value is None else value.tensor_split(pieces) for value in self]
        return [QuestionInputs(*row) for row in zip(*columns, strict=True)]  # type: ignore[arg-type]


class VisionLanguageStudent(Student):
    """A student, made of the parts of another, and what it learns to answer with. Its tower learns from answers where `tower_learns`."""

    def __init__(self, student: Student, decoder: Decoder, layer: int, *, tower_learns: bool) -> None:
        super().__init__(student.clip, dict(student.heads.items()), student.max_scale)
        self.decoder, self._layer, self._tower_learns = decoder, layer, tower_learns

    def forward(  # type: ignore[override]
        self, pixels: Tensor | None = None, tokens: Tensor | None = None, questions: QuestionInputs | None = None
    ) -> dict[str, Tensor]:
        """The student's outputs for the pairs, and the decoder's `answer_nll`, `answer_tokens`, each (B,), for the questions."""
        outputs = super().forward(pixels, tokens) if pixels is not None and tokens is not None else {}
        if questions is not None:
            visual_BVC = None if questions.pixels is None else self.look(questions.pixels)
            outputs |= self.decoder(visual_BVC, *questions[1:])
        return outputs

    def look(self, pixels: Tensor) -> Tensor:
        """(B, V, C): what the decoder reads of each image.

        Where the tower does not learn from answers: without a gradient, and in evaluation mode, so that batch norm learns nothing either.
        """
        visual: nn.Module = self.clip.visual  # type: ignore[assignment]
        if self._tower_learns:
            return patch_tokens(visual, pixels, self._layer)
        training = visual.training
        visual.eval()
        try:
            with torch.no_grad():
                return patch_tokens(visual, pixels, self._layer)
        finally:
            visual.train(training)


def freeze_all_but(module: nn.Module, *prefixes: str) -> None:
    """Only parameters whose names start with one of `prefixes` are trained."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(prefixes))
