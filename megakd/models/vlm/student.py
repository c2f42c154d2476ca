"""What DeepSpeed's engine holds where a decoder learns to answer: the student, where there is one, and the decoder, in one module.

Both losses of a step come from one forward, through the same vision tower: KD from image-text pairs, answers from questions about other
images. Without an active objective there are no pairs; a blind run has no student and so no tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megakd.models.patches import evaluating, patch_tokens
from megakd.models.student import Student
from megakd.models.vlm.decoder import DecoderModel, Divergence

# Legend: B questions, L tokens of a conversation, V patches of the tower, C its width.


class QuestionInputs(NamedTuple):
    """Questions as the decoder takes them. pixels: (B, 3, H, W), normalised; None without a tower. The others are (B, L).

    divergence: from a teacher that has read these questions, see `DecoderModel.forward`.
    """

    pixels: Tensor | None
    ids_BL: Tensor
    attend_BL: Tensor
    image_mask_BL: Tensor
    labels_BL: Tensor
    divergence: Divergence | None = None

    def split(self, micro_batches: int) -> list[QuestionInputs]:
        """One part for each micro-batch; their sizes differ by at most one. A teacher reads each part by itself."""
        assert self.divergence is None
        columns = [[None] * micro_batches if value is None else value.tensor_split(micro_batches) for value in self[:5]]
        return [QuestionInputs(*row) for row in zip(*columns, strict=True)]  # type: ignore[arg-type]


class VisionLanguageStudent(Student):
    """A student, made of the parts of another, and what it learns to answer with. Its tower learns from answers where `tower_learns`."""

    def __init__(self, student: Student, decoder: DecoderModel, layer: int, *, tower_learns: bool) -> None:
        super().__init__(student.clip, dict(student.heads.items()), student.max_scale)
        self.decoder, self._layer, self._tower_learns = decoder, layer, tower_learns

    def forward(  # type: ignore[override]
        self,
        pixels: Tensor | None = None,
        tokens: Tensor | None = None,
        taught: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        questions: QuestionInputs | None = None,
    ) -> dict[str, Tensor]:
        """The student's outputs for the pairs, and the decoder's, each (B,), for the questions: see `DecoderModel.forward`."""
        outputs = super().forward(pixels, tokens, taught) if pixels is not None and tokens is not None else {}
        if questions is not None:
            visual_BVC = None if questions.pixels is None else self.look(questions.pixels)
            outputs |= self.decoder(visual_BVC, *questions[1:])
        return outputs

    def look(self, pixels: Tensor) -> Tensor:
        """(B, V, C): what the decoder reads of each image. A tower that does not learn from answers runs in evaluation mode, without
        gradient."""
        visual: nn.Module = self.clip.visual  # type: ignore[assignment]
        if self._tower_learns:
            return patch_tokens(visual, pixels, self._layer)
        with torch.no_grad(), evaluating(visual):
            return patch_tokens(visual, pixels, self._layer)


def freeze_all_but(module: nn.Module, *prefixes: str) -> None:
    """Only parameters whose names start with one of `prefixes` are trained."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(prefixes))
