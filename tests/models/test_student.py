"""The student's contract: what its outputs are, where its scale stops, what its heads add."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megakd.models.heads import Head
from megakd.models.student import Student, embeddings, normalised
from support.parameter_groups import decay_groups


class Towers(nn.Module):
    """Two linear towers with open_clip's names."""

    def __init__(self, log_scale: float, bias: float | None = None) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.logit_scale = nn.Parameter(torch.tensor(log_scale))
        if bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(bias))

    def encode_image(self, x: Tensor) -> Tensor:
        return self.image(x)

    def encode_text(self, x: Tensor) -> Tensor:
        return self.text(x)


def _forward(student: Student) -> dict[str, Tensor]:
    return student(torch.randn(3, 6), torch.randn(3, 5))


def test_embeddings_are_unit_rows_with_the_heads_projections_by_name() -> None:
    student = Student(Towers(1.0), {"feature": Head("linear", 4, 7)}, 100.0)
    found = embeddings(_forward(student))
    assert found.image.shape == found.text.shape == (3, 4)
    assert found.projected.keys() == {"feature"}
    for rows in (found.image, found.text, *found.projected["feature"]):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(3))
    assert found.projected["feature"][0].shape == (3, 7)
    assert found.scale.item() == pytest.approx(math.e)
    assert found.bias is None


def test_a_bias_of_a_sigmoid_model_is_handed_on() -> None:
    assert embeddings(_forward(Student(Towers(1.0, bias=-10.0), {}, 100.0))).bias == -10.0


def test_the_scale_stops_at_its_bound_but_can_come_back() -> None:
    student = Student(Towers(math.log(150.0)), {}, 100.0)
    scale = _forward(student)["scale"]
    assert scale.item() == pytest.approx(100.0, rel=1e-5)
    scale.backward()
    parameter = dict(student.named_parameters())["clip.logit_scale"]
    assert parameter.grad is not None
    assert parameter.grad.item() > 0


@pytest.mark.parametrize("bound", [50.0, 100.0, 33.3, 7.0])
@pytest.mark.parametrize("start", [1.0, 1.0005, 1.01, 30.0])
def test_no_loss_sees_a_scale_above_its_bound_whatever_the_type_of_the_parameter(bound: float, start: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student = Student(Towers(math.log(bound * start)), {}, bound)
        student.clip.logit_scale.data = student.clip.logit_scale.data.to(dtype)  # type: ignore[union-attr, operator]
        scale = _forward(student)["scale"]
        assert scale.dtype == torch.float32
        assert scale.item() <= torch.tensor(bound).item()


def test_a_rounded_parameter_is_read_as_its_optimizer_holds_it_and_still_learns() -> None:
    student = Student(Towers(1.0, bias=-10.0), {}, 100.0)
    scale: Any = student.clip.logit_scale
    scale.data, scale.in_float32 = scale.data.bfloat16(), torch.tensor([1.0037])
    outputs = _forward(student)
    assert outputs["scale"].item() == torch.tensor(1.0037).exp().item()
    outputs["scale"].backward()
    assert scale.grad.dtype == torch.bfloat16
    assert scale.grad.item() == pytest.approx(math.exp(1.0037), rel=2**-8)


def test_a_scale_below_its_bound_is_exact() -> None:
    assert _forward(Student(Towers(math.log(99.0)), {}, 100.0))["scale"].item() == pytest.approx(99.0, rel=1e-6)


def test_norms_are_taken_in_float32() -> None:
    rows = torch.randn(50, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = torch.nn.functional.normalize(rows.float(), dim=-1)
    assert torch.equal(normalised(rows), exact.bfloat16())


def test_the_scale_bias_and_every_vector_go_without_weight_decay() -> None:
    student = Student(Towers(1.0, bias=0.0), {"feature": Head("mlp", 4, 7)}, 100.0)
    decayed, free = decay_groups(student, 0.2)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {  # type: ignore[attr-defined]
        "clip.image.weight",
        "clip.text.weight",
        *(f"heads.feature.{side}.{layer}.weight" for side in ("image", "text") for layer in (0, 2)),
    }
    assert {"clip.logit_scale", "clip.logit_bias", "clip.image.bias"} <= {names[id(p)] for p in free["params"]}  # type: ignore[attr-defined]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.2, 0.0)
