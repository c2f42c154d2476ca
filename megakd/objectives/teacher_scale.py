"""The logit scale at which objectives see each teacher: its own, the recipe's `teacher.scale`, or the one that matches an entropy.

Legend: B pairs of this rank, N of all ranks, D width, c rows of a panel.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megakd.models.embeddings import Embeddings
from megakd.objectives.cost import FP32, LossCost, LossShape
from megakd.recipe import Recipe
from megakd.recipe.section import MATCHED
from megakd.runtime import wire
from megakd.runtime.wire import Wire
from megakd_kernels.distributed import Ranks
from megakd_kernels.panels import Logits, chunk_rows, chunks, scratch_panels
from megakd_kernels.precision import full_precision

log = logging.getLogger("megakd.objectives")

NAME = "teacher_scale"  # of its state in checkpoints, and of its values in metrics.jsonl
# A matched scale stays between these: at the lower one every row is uniform, the upper one is ten times CLIP's bound.
LOWEST, HIGHEST = 0.01, 1000.0
BISECTIONS = 30  # leave 1e-8 in the logarithm
# Part of the way to a batch's own scale that one step takes: a running mean of the logarithm over about ten batches.
RATE = 0.1
PANELS = 3  # (c, N) of float32 that live at once


def row_entropy(pair: Embeddings, scale: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Mean entropy, in nats, of the softmaxes of each image over the texts of all ranks; and the mean variance of a logit under them.

    The variance is how fast the entropy falls as log scale rises. Scalars in float64, equal on every rank, without gradient; a collective.
    """
    image_BD, sums_1 = pair.image.detach(), pair.image.new_zeros(1, 2, dtype=torch.float64)
    with torch.no_grad(), full_precision(image_BD.device):
        logits = Logits.of(image_BD, ranks.gather(pair.text.detach()), scale.float())
        chunk = chunk_rows(len(image_BD), len(logits.right_ND), torch.float32, image_BD.device)
        panels = scratch_panels(2, chunk, logits)
        for rows in chunks(len(image_BD), chunk):
            log_p_cN, p_cN = logits.rows(rows, panels[0]), panels[1][: rows.stop - rows.start]
            log_p_cN.sub_(log_p_cN.logsumexp(1, keepdim=True))
            torch.exp(log_p_cN, out=p_cN)
            entropy_c = -(p_cN * log_p_cN).sum(1)
            variance_c = p_cN.mul_(log_p_cN.add_(entropy_c[:, None]).square_()).sum(1)  # of log p, which is the logit less a constant
            sums_1 += torch.stack([entropy_c.sum(dtype=torch.float64), variance_c.sum(dtype=torch.float64)])
        entropy, variance = (ranks.gather(sums_1).sum(0) / (len(image_BD) * ranks.world)).unbind()
    return entropy, variance


class TeacherScales:
    """Of the recipe's teachers that have a weight, in their order.

    state: the logarithm of each matched scale by the teacher's role; (), float64, equal on every rank.
    """

    def __init__(self, recipe: Recipe, group: ProcessGroup | None) -> None:
        self._settings, self._student_scale, self._group = recipe.weighted_teachers(), recipe.similarity.student_scale, group
        self.matched = [role for role, settings in self._settings.items() if settings.scale == MATCHED]
        self.state = dict[str, Tensor]()

    def __call__(self, student: Embeddings, teachers: Sequence[Embeddings]) -> list[Embeddings]:
        """The teachers, live or from a store, at their scales: what the embeddings themselves are does not depend on these.

        Moves the matched ones by this batch, which is a collective; once a step.
        """
        if all(settings.scale is None for settings in self._settings.values()):
            return list(teachers)
        ranks, of_student = Ranks.of(self._group), None
        for (role, settings), teacher in zip(self._settings.items(), teachers, strict=True):
            if settings.scale == MATCHED and settings.entropy is not None:
                self._match(role, teacher, teacher.scale.new_full((), settings.entropy, dtype=torch.float64), ranks)
            elif settings.scale == MATCHED:
                if of_student is None:
                    own = student.scale.detach() if self._student_scale is None else student.scale.new_full((), self._student_scale)
                    of_student, _ = row_entropy(student, own, ranks)
                self._match(role, teacher, of_student, ranks)
        return self.scaled(teachers)

    def scaled(self, teachers: Sequence[Embeddings]) -> list[Embeddings]:
        """The teachers at their scales, the matched ones as the last call has left them."""
        scaled = list[Embeddings]()
        for (role, settings), teacher in zip(self._settings.items(), teachers, strict=True):
            scale = teacher.scale
            if isinstance(settings.scale, float):
                scale = scale.new_full((), settings.scale)
            elif settings.scale == MATCHED:
                scale = self.state[role].exp()
            scaled.append(teacher._replace(scale=scale.to(teacher.scale.dtype)))
        return scaled

    def _match(self, role: str, teacher: Embeddings, target: Tensor, ranks: Ranks) -> None:
        """Move the running scale by this batch to where the entropy of the teacher's rows is `target`.

        The first batch is matched by bisection. Each later one takes a part of a step of Newton's method on the logarithm, of which a
        batch that is unlike the others cannot take more than one.
        """
        if role not in self.state:
            self.state[role] = bisected(teacher, target, ranks)
            _tell_of_an_end(role, float(self.state[role].exp()), float(target))
        else:
            entropy, variance = row_entropy(teacher, self.state[role].exp(), ranks)
            newton = (entropy - target) / variance.clamp_min(1e-12)
            moved = self.state[role] + RATE * newton.clamp(-1, 1)
            self.state[role] = moved.clamp(math.log(LOWEST), math.log(HIGHEST))

    def values(self) -> dict[str, Tensor]:
        """The matched scales by role, as the last step used them."""
        return {role: self.state[role].exp() for role in self.matched}

    def cost(self, shape: LossShape) -> LossCost:
        """Of a step: a pass over the rows of each matched teacher, and one over the student's where they follow it."""
        if not self.matched:
            return LossCost(0, Wire(), 0)
        follows = any(self._settings[role].entropy is None for role in self.matched)
        widths = (shape.widths[0] * follows, shape.widths[1] * len(self.matched) // max(1, shape.teachers))
        local = shape.pairs // shape.ranks
        panels = PANELS * chunk_rows(local, shape.pairs, torch.float32, shape.device) * shape.pairs * FP32
        # texts of all ranks, and in float32 where they are not
        sides = zip(widths, shape.elements, strict=True)
        gathered = shape.pairs * max(width * (element * (shape.ranks > 1) + FP32 * (element < FP32)) for width, element in sides)
        texts = shape.pairs * sum(width * element for width, element in zip(widths, shape.elements, strict=True))
        sent = wire.gathered(texts, shape.ranks, len(self.matched) + follows)
        return LossCost(panels + gathered, sent, 2 * shape.pairs * local * sum(widths))


def bisected(teacher: Embeddings, target: Tensor, ranks: Ranks) -> Tensor:
    """The logarithm of the scale at which the batch's entropy is `target`; where none between LOWEST and HIGHEST is, the nearer end."""
    low, high = (target.new_tensor(math.log(end)) for end in (LOWEST, HIGHEST))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_softer = row_entropy(teacher, middle.exp(), ranks)[0] > target
        low, high = torch.where(is_softer, middle, low), torch.where(is_softer, high, middle)
    return (low + high) / 2


def _tell_of_an_end(role: str, scale: float, target: float) -> None:
    for end, than in ((LOWEST, "more even"), (HIGHEST, "sharper")):
        if math.isclose(scale, end, rel_tol=1e-6):
            log.warning(
                "%s.scale = 'matched': on the first batch an entropy of %.4g nats asks for %s rows than any scale from %g to %g makes of "
                "this teacher's: it starts at %g, and metrics.jsonl says where it goes", role, target, than, LOWEST, HIGHEST, end,
            )  # fmt: skip
