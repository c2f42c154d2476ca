"""What objectives train beside the student's towers: projections of its embeddings and patch tokens, and what they read of the tower.

Heads are inside the module that the engine trains, so they are synchronised, clipped and checkpointed like every other parameter.
Legend: B local batch, D embedding width, T a teacher's, F both together, C a block's width, h x w its grid of patches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.masking import Masked
from megakd.models.patches import Patches, Read
from megakd.runtime.precision import exact

FIRST_SCALE = 1 / 0.07  # of a learned one, as CLIP's


@dataclass(frozen=True)
class ModelShape:
    """What a head or a loss must know of a model. width: D. patches: of the blocks that an objective reads, by what it reads of them.

    has_text: whether it has a text tower.
    """

    width: int
    patches: Mapping[Read, Patches] = field(default_factory=dict)
    has_text: bool = True


class ObjectiveHead(nn.Module, ABC):
    """blocks: of the student's vision tower, what it is given of them; -1 is the last. summary: for the run's first lines.

    view: how the images that it is given embeddings of are masked; None: the whole ones. What differs costs the tower a further forward,
    one for all heads of an equal view. Patch tokens are always of whole images.
    teacher_width: of the teacher whose embeddings it is given, which come from outside the engine's module; 0: none.
    has_scale: whether it learns a logit scale, its output "scale".
    """

    blocks: tuple[Read, ...] = ()
    view: Masked | None = None
    teacher_width: int = 0
    has_scale: bool = False
    summary: str = ""

    @abstractmethod
    def project(
        self, image_BD: Tensor, text_BD: Tensor, patches: Mapping[Read, Tensor], teacher: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Outputs by name, with B rows each, of the towers' embeddings as they come and of the patch tokens (B, h, w, C) of `blocks`.

        teacher: its embeddings of the same images and texts, (B, teacher_width), of unit length; None where the head reads none.
        "image" and "text" come to the objective as `Embeddings.projected`, others, a "scale" () among them, as `Embeddings.features`.
        """


class ScaledHead(ObjectiveHead):
    """max_scale: with a learned logit scale of its own, the output "scale", which is at most this; None: without."""

    def __init__(self, max_scale: float | None) -> None:
        super().__init__()
        self._max_scale, self.has_scale = max_scale, max_scale is not None
        if max_scale is not None:
            self.log_scale = nn.Parameter(torch.full((1,), math.log(min(FIRST_SCALE, max_scale))))

    def outputs(self, image_BD: Tensor, text_BD: Tensor) -> dict[str, Tensor]:
        """At unit length, with the scale."""
        rows = {"image": normalised(image_BD), "text": normalised(text_BD)}
        return rows if self._max_scale is None else rows | {"scale": learned_scale(self.log_scale, self._max_scale)}


class Head(ScaledHead):
    """One projection for each modality, from the student's width to the teacher's.

    text: False for a teacher without a text tower, and texts then are of width 0, as that teacher's.
    """

    def __init__(self, kind: str, student_width: int, teacher_width: int, max_scale: float | None = None, *, text: bool = True) -> None:
        super().__init__(max_scale)
        self.image = projection(kind, student_width, teacher_width)
        self.text = projection(kind, student_width, teacher_width) if text else None
        self.summary = kind if kind == "none" else f"{kind} {student_width} -> {teacher_width}"

    def project(
        self, image_BD: Tensor, text_BD: Tensor, patches: Mapping[Read, Tensor], teacher: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        return self.outputs(self.image(image_BD), text_BD[:, :0] if self.text is None else self.text(text_BD))


class FusionHead(ScaledHead):
    """The student's unit embedding and the teacher's side by side, by a linear map for each modality to the student's width."""

    def __init__(self, student_width: int, teacher_width: int, max_scale: float | None = None) -> None:
        super().__init__(max_scale)
        self.image, self.text = (nn.Linear(student_width + teacher_width, student_width) for _ in range(2))
        self.teacher_width = teacher_width
        self.summary = f"fusion {student_width} + {teacher_width} -> {student_width}"

    def project(
        self, image_BD: Tensor, text_BD: Tensor, patches: Mapping[Read, Tensor], teacher: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        assert teacher is not None, "the task hands over what `teacher_width` asks for"
        both = zip((image_BD, text_BD), teacher, strict=True)
        image_BF, text_BF = (torch.cat([normalised(own_BD), taught_BT.to(own_BD.dtype)], dim=1) for own_BD, taught_BT in both)
        return self.outputs(self.image(image_BF), self.text(text_BF))


def head_between(key: str, kind: str, student: ModelShape, teacher: ModelShape, max_scale: float | None = None) -> Head:
    """kind: as the recipe's `key` asks; "auto" is "none" at equal widths and else "linear".

    Raises ValueError for "none" at unlike widths.
    """
    if kind == "auto":
        kind = "none" if student.width == teacher.width else "linear"
    if kind == "none" and student.width != teacher.width:
        raise ValueError(
            f"{key} = 'none': the student's embeddings have {student.width} numbers and the teacher's {teacher.width}; set {key} to "
            f"'linear' or 'mlp', or give the student an architecture with embed_dim = {teacher.width}"
        )
    return Head(kind, student.width, teacher.width, max_scale, text=teacher.has_text)


def projection(kind: str, inputs: int, outputs: int) -> nn.Module:
    """kind: "none", which changes nothing; "linear"; or "mlp" with one hidden layer."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(inputs, outputs, bias=False)
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def learned_scale(log_scale: Tensor, max_scale: float) -> Tensor:
    """(), float32, also in a bf16 engine: exp(log_scale), at most `max_scale`. log_scale: a parameter of one number."""
    # Clamped in value, not in gradient: above the bound a hard clamp would have no gradient and the scale would stay there.
    log_scale = exact(log_scale).reshape(())
    excess = (log_scale - math.log(max_scale)).clamp(min=0).detach()
    scale = (log_scale - excess).exp()
    return scale - (scale - max_scale).clamp(min=0).detach()  # exp rounds: exp(log(100)) may be 100.00001


def normalised(embedding_BD: Tensor) -> Tensor:
    """Unit rows, the norm taken in float32: a bf16 norm is off by up to 0.4 %, which a logit scale of 100 makes visible."""
    return F.normalize(embedding_BD.float(), dim=-1).to(embedding_BD.dtype)
