"""What DeepSpeed's engine holds: the student's towers and the objectives' heads, as one module with one forward.

The heads are inside, so that they are synchronised, clipped and checkpointed like every other trained parameter. There is one forward
because ZeRO-3 gathers parameters only in hooks of `forward`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.embeddings import Embeddings
from megakd.runtime.precision import exact, of_towers

# Legend: B local batch, D embedding width.

SCALARS = ("logit_scale", "logit_bias")


class Student(nn.Module):
    """Towers and heads. `heads` maps an objective's name to a module that projects (B, D_student) to (B, D_teacher).

    clip: None where a decoder alone is trained, which sees nothing.
    """

    def __init__(self, clip: nn.Module | None, heads: dict[str, nn.Module], max_scale: float) -> None:
        super().__init__()
        self.clip: nn.Module = clip  # type: ignore[assignment]
        for name in SCALARS:
            scalar = getattr(clip, name, None)
            if scalar is not None:
                # DeepSpeed 0.19.8 broadcasts parameters as bytes, which torch refuses for those without a dimension.
                setattr(clip, name, nn.Parameter(scalar.detach().reshape(1)))
        self.heads = nn.ModuleDict(heads)
        self.max_scale = max_scale

    def forward(self, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Outputs by name, a flat dict of tensors so that gradients can be cached for each; `embeddings` makes `Embeddings` of them.

        Scale and bias are float32, also in a bf16 engine, and the scale is at most `max_scale`.
        """
        image_BD = self.clip.encode_image(pixels)  # type: ignore[operator]
        text_BD = self.clip.encode_text(tokens)  # type: ignore[operator]
        outputs: dict[str, Tensor] = {"image": normalised(image_BD), "text": normalised(text_BD), "scale": self._scale()}
        bias = getattr(self.clip, "logit_bias", None)
        if bias is not None:
            outputs["bias"] = exact(bias).reshape(())
        for name, head in self.heads.items():
            outputs[f"{name}.image"] = normalised(head.image(image_BD))  # type: ignore[operator]
            outputs[f"{name}.text"] = normalised(head.text(text_BD))  # type: ignore[operator]
        return outputs

    def _scale(self) -> Tensor:
        # Clamped in value, not in gradient: above the bound a hard clamp would have no gradient and the scale would stay there.
        log_scale = exact(self.clip.logit_scale).reshape(())  # type: ignore[arg-type]
        excess = (log_scale - math.log(self.max_scale)).clamp(min=0).detach()
        scale = (log_scale - excess).exp()
        return scale - (scale - self.max_scale).clamp(min=0).detach()  # exp rounds: exp(log(100)) may be 100.00001


class Head(nn.Module):
    """One projection for each modality, from the student's width to the teacher's."""

    def __init__(self, kind: str, student_width: int, teacher_width: int) -> None:
        super().__init__()

        def projection() -> nn.Module:
            if kind == "linear":
                return nn.Linear(student_width, teacher_width, bias=False)
            return nn.Sequential(nn.Linear(student_width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width))

        self.image, self.text = projection(), projection()


def normalised(embedding_BD: Tensor) -> Tensor:
    """Unit rows, the norm taken in float32: a bf16 norm is off by up to 0.4 %, which a logit scale of 100 makes visible."""
    return F.normalize(embedding_BD.float(), dim=-1).to(embedding_BD.dtype)


def embeddings(outputs: dict[str, Tensor]) -> Embeddings:
    """The outputs of `Student.forward` as the objectives see them."""
    names = sorted({key.split(".")[0] for key in outputs if "." in key})
    projected = {name: (outputs[f"{name}.image"], outputs[f"{name}.text"]) for name in names}
    return Embeddings(outputs["image"], outputs["text"], outputs["scale"], outputs.get("bias"), projected)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block: no dropout, and batch norm goes by its running statistics without updating them."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def encode_images(clip: nn.Module, pixels: Tensor) -> Tensor:
    """(B, D) unit rows, without gradient: for teachers and for evaluation."""
    with torch.no_grad(), of_towers(pixels.device):
        return normalised(clip.encode_image(pixels))  # type: ignore[operator]


def encode_texts(clip: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad(), of_towers(tokens.device):
        return normalised(clip.encode_text(tokens))  # type: ignore[operator]
