"""InfoNCE between the student's own towers: CLIP's loss, with no teacher in it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megakd.models.embeddings import Embeddings
from megakd.recipe import Recipe
from megakd_kernels import contrastive


class Contrastive:
    """Mean cross-entropy of the true pair over the rows and the columns of the similarity matrix of the global batch.

    Source: CLIP (arXiv 2103.00020).
    """

    needs_teacher = False

    def __init__(self, recipe: Recipe) -> None:
        del recipe  # it has no settings

    def head(self, student_width: int, teacher_width: int) -> nn.Module | None:
        return None

    def __call__(self, student: Embeddings, teacher: Embeddings | None, group: ProcessGroup | None) -> Tensor:
        return contrastive(student, group=group)
