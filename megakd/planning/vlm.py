"""A decoder that learns to answer, on `meta`: the module that its run trains, one forward of it over questions of full length, and what a
teacher of its answers takes beside it.

Legend: B questions of a micro-batch, L tokens of a conversation (answers.max_length, every one of them: an upper bound), P image tokens,
V patches of the tower, C its width, H the decoder's width, N learned tokens, of which there are B (L - P) at most, W rows of the output
layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import masking_utils

from megakd.data.transforms import input_size, normalise
from megakd.export.bundle import resolve_bundle
from megakd.models import clip
from megakd.models.patches import patch_tokens
from megakd.models.student import Student
from megakd.models.vlm import decoder
from megakd.models.vlm.decoder import DecoderModel
from megakd.models.vlm.student import VisionLanguageStudent, freeze_all_but
from megakd.objectives.answer_divergence import TokenDivergence
from megakd.planning.memory_tracker import MemoryTracker, fused_attention
from megakd.recipe import Answers, AnswerTeacher, Recipe, chain
from megakd.runtime import precision
from megakd.runtime.precision import Precision

META = torch.device("meta")


@dataclass(frozen=True)
class AnswerTeacherCost:
    """A teacher of answers on one rank, in bytes. activations: of reading a micro-batch, its pixels and logits included.

    logits: of the whole step's answer tokens, which are held from its reading to the update. raw: of its questions as the loader brings
    them. flops: of reading one.
    """

    name: str
    numel: int
    weights: int
    activations: int
    logits: int
    raw: int
    flops: int


class Learner(nn.Module):
    """`VisionLanguageStudent` with a forward that no value decides on, which tensors on meta do not have. length: L.

    taught: settings of a teacher, whose logits are counted by themselves; the panels of the divergence are those of a GPU.
    """

    def __init__(self, answering: VisionLanguageStudent, length: int, taught: AnswerTeacher | None) -> None:
        super().__init__()
        self.answering, self.length, self._taught = answering, length, taught
        self.words = answering.decoder.description.words
        self.register_buffer("taught_1V", torch.empty(1, self.words), persistent=False)

    def forward(
        self,
        pixels: Tensor | None,
        tokens: Tensor | None,
        taught: Mapping[str, tuple[Tensor, Tensor]],
        seen: Tensor | None,
        ids_BL: Tensor,
    ) -> dict[str, Tensor]:
        """As `VisionLanguageStudent.forward`. seen: the questions' images, None for a decoder without eyes."""
        outputs = {} if pixels is None or tokens is None else Student.forward(self.answering, pixels, tokens, taught)
        reader = self.answering.decoder
        visual_BVC = None if seen is None else self.answering.look(seen)
        row_N = torch.empty(len(ids_BL) * _learned(self.length, reader.image_tokens), dtype=torch.int64, device=META)
        logits_NW = _answer_logits(reader, visual_BVC, ids_BL, row_N).float()
        losses = {"answer_nll": F.cross_entropy(logits_NW, row_N, reduction="none")}
        if self._taught is not None:
            teacher_NV: Any = self.taught_1V
            losses["answer_kl"] = TokenDivergence(self._taught, teacher_NV.expand(len(row_N), -1), self.words)(logits_NW)
        return outputs | {name: loss_N.new_zeros(len(ids_BL)).index_add(0, row_N, loss_N) for name, loss_N in losses.items()}


def _learned(length: int, image_tokens: int) -> int:
    """N of one question."""
    return min(length - 1, length - image_tokens)


def _answer_logits(reader: DecoderModel, visual_BVC: Tensor | None, ids_BL: Tensor, row_N: Tensor) -> Tensor:
    """As `DecoderModel.answer_logits`."""
    embeddings_BLH: Tensor = reader.language.get_input_embeddings()(ids_BL)
    if reader.projector is not None:
        assert visual_BVC is not None
        image_BPH = reader.projector(visual_BVC).to(embeddings_BLH.dtype)
        place_BL = torch.empty_like(ids_BL)
        image_BLH = image_BPH.gather(1, place_BL[..., None].expand(*place_BL.shape, image_BPH.shape[2]))
        embeddings_BLH = torch.where(place_BL[..., None] > 0, image_BLH, embeddings_BLH)
    with mock.patch.object(masking_utils, "is_tracing", return_value=True):  # else it asks whether the mask leaves anything out
        attend_BL = torch.empty_like(ids_BL)
        logits_BLW = reader.language(inputs_embeds=embeddings_BLH, attention_mask=attend_BL, use_cache=False).logits
    logits_NW: Tensor = logits_BLW[:, :-1][row_N, torch.empty_like(row_N)]
    return logits_NW


def answer_teacher(answers: Answers, image_tokens: int, micro: int, local: int, kind: Precision) -> AnswerTeacherCost:
    """answers: with a teacher. image_tokens: the student's. micro, local: questions of a micro-batch and of a rank's step.

    Reads the bundle's files for their checksums. Raises ValueError as `resolve_bundle` does, and for a quantised language model.
    """
    assert answers.teacher is not None
    key, dtype = f"answers.teacher.bundle = {answers.teacher.bundle!r}", precision.dtype(kind)
    try:
        spec = resolve_bundle(Path(answers.teacher.bundle), quantise=answers.teacher.quantise)
        with META:
            tower = None if spec.tower is None else clip.build(spec.tower, META, kind, load_weights=False)
        visual: Any = None if tower is None else tower.clip.visual.eval()  # type: ignore[operator,union-attr]
        reader = decoder.build(spec.decoder, visual, META, dtype).eval()
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if spec.decoder.settings.quantise != "none":
        raise ValueError(
            f"{key}: its language model is held in {spec.decoder.settings.quantise}, which the plan does not count yet; plan with --set "
            f"answers.teacher.quantise=none, which needs more"
        )
    learned, length = _learned(answers.max_length, image_tokens), answers.max_length - image_tokens + reader.image_tokens

    def read(questions: int, pixels: Tensor | None, ids_BL: Tensor) -> Tensor:
        row_N = torch.empty(questions * learned, dtype=torch.int64, device=META)
        visual_BVC = None
        if tower is not None and pixels is not None:
            visual_BVC = patch_tokens(visual, normalise(pixels, tower.preprocess, dtype), reader.settings.layer)
        return _answer_logits(reader, visual_BVC, ids_BL, row_N)

    def given(questions: int) -> tuple[Tensor | None, Tensor]:
        size = None if tower is None else input_size(tower.preprocess)
        pixels = None if size is None else torch.empty(questions, 3, *size, dtype=torch.uint8, device=META)
        return pixels, torch.empty(questions, length, dtype=torch.int64, device=META)

    weights = [*reader.parameters(), *reader.buffers(), *(() if visual is None else (*visual.parameters(), *visual.buffers()))]
    inputs, watch = given(micro), MemoryTracker("meta")
    watch.ignore([*weights, *(one for one in inputs if one is not None)])
    with torch.no_grad(), fused_attention(), watch:
        read(micro, *inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        read(1, *given(1))
    pixels, ids_BL = given(local)
    # ids and labels are integers of 8 bytes, the two masks have one
    raw = (0 if pixels is None else pixels.nbytes) + ids_BL.numel() * (2 * 8 + 2)
    held = local * learned * spec.decoder.rows * dtype.itemsize
    numel = sum(one.numel() for one in weights)
    return AnswerTeacherCost(
        answers.teacher.bundle, numel, sum(one.nbytes for one in weights), watch.peak, held, raw, int(counter.get_total_flops())
    )


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
    visual: Any = None if recipe.student is None else student.clip.visual
    reader = decoder.build(decoder.resolve(chain.decoder(recipe.decoder)), visual, META)
    tower_learns = recipe.answers.tower == "trained"
    answering = VisionLanguageStudent(student, reader, recipe.decoder.layer, tower_learns=tower_learns)
    if not recipe.active():
        freeze_all_but(answering, "decoder.", *(("clip.visual.",) if tower_learns else ()))
    return Learner(answering, recipe.answers.max_length, recipe.answers.teacher)
