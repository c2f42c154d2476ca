"""What objectives train beside the student's towers: projections of its embeddings and patch tokens, and what they read of the tower.

Heads are inside the module that the engine trains, so they are synchronised, clipped and checkpointed like every other parameter.
Legend: B local batch, D embedding width, C a block's width, h x w its grid of patches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.patches import Patches


@dataclass(frozen=True)
class ModelShape:
    """What a head or a loss must know of a model. width: D. patches: of the blocks that an objective reads, by its number of them."""

    width: int
    patches: Mapping[int, Patches] = field(default_factory=dict)


class ObjectiveHead(nn.Module, ABC):
    """blocks: of the student's vision tower, whose patch tokens it is given; -1 is the last."""

    blocks: tuple[int, ...] = ()

    @abstractmethod
    def project(self, image_BD: Tensor, text_BD: Tensor, patches: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, with B rows each, of the towers' embeddings as they come and of the patch tokens (B, h, w, C) of `blocks`.

        "image" and "text" come to the objective as `Embeddings.projected`, others as `Embeddings.features`.
        """


class Head(ObjectiveHead):
    """One projection for each modality, from the student's width to the teacher's; its outputs are of unit length."""

    def __init__(self, kind: str, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.image, self.text = (projection(kind, student_width, teacher_width) for _ in range(2))

    def project(self, image_BD: Tensor, text_BD: Tensor, patches: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return {"image": normalised(self.image(image_BD)), "text": normalised(self.text(text_BD))}


def projection(kind: str, inputs: int, outputs: int) -> nn.Module:
    """kind: "none", "linear", or "mlp" with one hidden layer."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(inputs, outputs, bias=False)
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def normalised(embedding_BD: Tensor) -> Tensor:
    """Unit rows, the norm taken in float32: a bf16 norm is off by up to 0.4 %, which a logit scale of 100 makes visible."""
    return F.normalize(embedding_BD.float(), dim=-1).to(embedding_BD.dtype)
