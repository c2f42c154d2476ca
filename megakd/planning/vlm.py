"""A decoder that learns to answer, on `meta`: the module that its run trains, and one forward of it over questions of full length.

Legend: B questions of a micro-batch, L tokens of a conversation (answers.max_length, every one of them: an upper bound), P image tokens,
H the decoder's width, N learned tokens, of which there are B (L - P) at most.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import masking_utils

from megakd.models.student import Student
from megakd.models.vlm import decoder
from megakd.models.vlm.student import VisionLanguageStudent, freeze_all_but
from megakd.recipe import Recipe, chain

META = torch.device("meta")


class Learner(nn.Module):
    """`VisionLanguageStudent` with a forward that no value decides on, which tensors on meta do not have. length: L."""

    def __init__(self, answering: VisionLanguageStudent, length: int) -> None:
        super().__init__()
        self.answering, self.length = answering, length

    def forward(self, pixels: Tensor | None, tokens: Tensor | None, seen: Tensor | None, ids_BL: Tensor) -> dict[str, Tensor]:
        """As `VisionLanguageStudent.forward`. seen: the questions' images, None for a decoder without eyes."""
        outputs = {} if pixels is None or tokens is None else Student.forward(self.answering, pixels, tokens)
        reader = self.answering.decoder
        embeddings_BLH: Tensor = reader.language.get_input_embeddings()(ids_BL)
        if reader.projector is not None:
            assert seen is not None
            image_BPH = reader.projector(self.answering.look(seen)).to(embeddings_BLH.dtype)
            place_BL = torch.empty_like(ids_BL)
            image_BLH = image_BPH.gather(1, place_BL[..., None].expand(*place_BL.shape, image_BPH.shape[2]))
            embeddings_BLH = torch.where(place_BL[..., None] > 0, image_BLH, embeddings_BLH)
        with mock.patch.object(masking_utils, "is_tracing", return_value=True):  # else it asks whether the mask leaves anything out
            attend_BL = torch.empty_like(ids_BL)
            logits_BLW = reader.language(inputs_embeds=embeddings_BLH, attention_mask=attend_BL, use_cache=False).logits
        learned = len(ids_BL) * min(self.length - 1, self.length - reader.image_tokens)
        row_N, column_N = (torch.empty(learned, dtype=torch.int64, device=META) for _ in range(2))
        nll_N = F.cross_entropy(logits_BLW[:, :-1][row_N, column_N].float(), row_N, reduction="none")
        return outputs | {"answer_nll": nll_N.new_zeros(len(ids_BL)).index_add(0, row_N, nll_N)}


def learner(recipe: Recipe, student: Student) -> Learner:
    """What the run of `recipe` gives to its engine. student: on meta, without towers for a decoder without eyes.

    Raises ValueError as `decoder.describe` and `decoder.build` do, and for a quantised language model.
    """
    assert recipe.decoder is not None
    assert recipe.answers is not None
    if recipe.decoder.quantise != "none":
        raise ValueError(
            f"decoder.quantise = {recipe.decoder.quantise!r}: the plan counts no quantised language model yet; plan with "
            f"--set decoder.quantise=none, which needs more"
        )
    if recipe.answers.teacher is not None:
        raise ValueError(
            f"answers.teacher.bundle = {recipe.answers.teacher.bundle!r}: the plan counts neither its weights nor "
            f"its logits; plan without [answers.teacher], and add its weights' size"
        )
    visual: Any = None if recipe.student is None else student.clip.visual
    reader = decoder.build(decoder.resolve(chain.decoder(recipe.decoder)), visual, META)
    tower_learns = recipe.answers.tower == "trained"
    answering = VisionLanguageStudent(student, reader, recipe.decoder.layer, tower_learns=tower_learns)
    if not recipe.objectives.active():
        freeze_all_but(answering, "decoder.", *(("clip.visual.",) if tower_learns else ()))
    return Learner(answering, recipe.answers.max_length)
