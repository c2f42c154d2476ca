"""What DeepSpeed's engine holds: the student's towers and the objectives' heads, as one module with one forward.

The heads are inside, so that they are synchronised, clipped and checkpointed like every other trained parameter. There is one forward
because ZeRO-3 gathers parameters only in hooks of `forward`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from megakd.models.casts import SCALARS
from megakd.models.embeddings import Embeddings
from megakd.models.heads import ObjectiveHead, learned_scale, normalised
from megakd.models.masking import Masked
from megakd.models.patches import TowerReader
from megakd.runtime.precision import exact, of_towers

# Legend: B local batch, D embedding width.


class Student(nn.Module):
    """Towers and heads, by the names of their objectives. clip: None where a decoder alone is trained, which sees nothing.

    frozen: names of the parameters that `student.freeze` holds; they are part of what is saved and exported all the same.
    """

    def __init__(self, clip: nn.Module | None, heads: Mapping[str, ObjectiveHead], max_scale: float) -> None:
        super().__init__()
        self.clip: nn.Module = clip  # type: ignore[assignment]
        for name in SCALARS:
            scalar = getattr(clip, name, None)
            if scalar is not None:
                # DeepSpeed 0.19.8 broadcasts parameters as bytes, which torch refuses for those without a dimension.
                setattr(clip, name, nn.Parameter(scalar.detach().reshape(1)))
        self.heads: Mapping[str, ObjectiveHead] = nn.ModuleDict(heads)  # type: ignore[assignment]
        self.max_scale = max_scale
        self.frozen: frozenset[str] = frozenset()
        self._still: list[nn.Module] = []

    def freeze(self, names: Collection[str]) -> None:
        """Parameters, by these names, that are not trained. What holds no other stays in evaluation mode: no dropout, and batch norm goes
        by its running statistics without moving them."""
        self.frozen = frozenset(names)
        for name, parameter in self.named_parameters():
            if name in self.frozen:
                parameter.requires_grad_(False)
        self._still = []
        for path, module in self.named_modules():
            held = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
            if held and self.frozen.issuperset(held):
                self._still.append(module)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    def forward(self, pixels: Tensor, tokens: Tensor, taught: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> dict[str, Tensor]:
        """Outputs by name, a flat dict of tensors so that gradients can be cached for each; `embeddings` makes `Embeddings` of them.

        tokens: (B, 0) of images without captions; the text tower then does nothing, and texts are (B, 0) as well.
        taught: (image, text) embeddings of its teacher for each head that reads some, by the head's name.
        Scale and bias are float32, also in a bf16 engine, and the scale is at most `max_scale`.
        """
        blocks = [block for head in self.heads.values() for block in head.blocks]
        with TowerReader(getattr(self.clip, "visual", None), blocks) as reader:
            image_BD = self.clip.encode_image(pixels)  # type: ignore[operator]
        text_BD = self.clip.encode_text(tokens) if tokens.shape[1] else image_BD[:, :0]  # type: ignore[operator]
        scale = learned_scale(self.clip.logit_scale, self.max_scale)  # type: ignore[arg-type]
        outputs: dict[str, Tensor] = {"image": normalised(image_BD), "text": normalised(text_BD), "scale": scale}
        bias = getattr(self.clip, "logit_bias", None)
        if bias is not None:
            outputs["bias"] = exact(bias).reshape(())
        patches = reader.maps(image_BD)
        seen: dict[Masked | None, Tensor] = {None: image_BD}
        given = taught or {}
        for name, head in self.heads.items():
            if head.view is not None and head.view not in seen:
                with head.view.applied(self.clip.visual, pixels) as masked:  # type: ignore[arg-type]
                    seen[head.view] = self.clip.encode_image(masked)  # type: ignore[operator]
            outputs |= {f"{name}.{key}": value for key, value in head.project(seen[head.view], text_BD, patches, given.get(name)).items()}
        return outputs


def embeddings(outputs: dict[str, Tensor]) -> Embeddings:
    """The outputs of `Student.forward` as the objectives see them."""
    names = sorted(key.removesuffix(".image") for key in outputs if key.endswith(".image"))
    projected = {name: (outputs[f"{name}.image"], outputs[f"{name}.text"]) for name in names}
    paired = {f"{name}.{modality}" for name in names for modality in ("image", "text")}
    features = {key: value for key, value in outputs.items() if "." in key and key not in paired}
    return Embeddings(outputs["image"], outputs["text"], outputs["scale"], outputs.get("bias"), projected, features)


def encode_images(clip: nn.Module, pixels: Tensor) -> Tensor:
    """(B, D) unit rows, without gradient: for teachers and for evaluation."""
    with torch.no_grad(), of_towers(pixels.device):
        return normalised(clip.encode_image(pixels))  # type: ignore[operator]


def encode_texts(clip: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad(), of_towers(tokens.device):
        return normalised(clip.encode_text(tokens))  # type: ignore[operator]
