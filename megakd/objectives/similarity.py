"""Similarity-matrix KD: the student's image-text similarities learn to be distributed as the teacher's."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megakd.models.embeddings import Embeddings
from megakd.recipe import Recipe
from megakd_kernels import similarity_kd


class Similarity:
    """Mean KL(teacher || student) over rows and columns, see `megakd_kernels.similarity_kd`.

    The student's logit scale is its learned one, or the recipe's `similarity.student_scale`, which then gets no gradient from here.
    """

    needs_teacher = True

    def __init__(self, recipe: Recipe) -> None:
        self._temperature = recipe.similarity.temperature
        self._student_scale = recipe.similarity.student_scale

    def head(self, student_width: int, teacher_width: int) -> nn.Module | None:
        return None

    def __call__(self, student: Embeddings, teacher: Embeddings | None, group: ProcessGroup | None) -> Tensor:
        if self._student_scale is not None:
            student = student._replace(scale=student.scale.new_tensor(self._student_scale))
        return similarity_kd(student, teacher, temperature=self._temperature, group=group).kd
