"""Each objective against torch's own functions, and where its gradients go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.nn import functional as F

from megakd.models.embeddings import Embeddings
from megakd.models.heads import ModelShape
from megakd.models.patches import Patches
from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext, head_name
from megakd.objectives.set import ObjectiveSet, build, weighted_sum
from megakd.recipe import Objectives, Recipe
from megakd.recipe import load as recipes
from megakd.recipe.objectives import declaration

# Legend: B pairs, D embedding width.
B = 12
CPU = torch.device("cpu")
NAMES = list(Objectives.model_fields)
WITH_TEACHER = [name for name in NAMES if declaration(name).needs_teacher]
HEADS = ("feature", "masked_feature", "interactive", "cross")
OF_PATCHES = ("patch", "patch_relation", "attention")
BLOCKS = {-2: Patches(4, 6, (2, 2))}


def _recipe(recipe_file: Path, *overrides: str) -> Recipe:
    return recipes.load(str(recipe_file), overrides)[0]


def _objective(recipe_file: Path, name: str, *overrides: str) -> Objective:
    """The objective `name` alone."""
    others = [f"objectives.{other}={float(other == name)}" for other in NAMES]
    (objective,) = build(_recipe(recipe_file, *others, *overrides), CPU)
    return objective


def _loss(objective: Objective, student: Embeddings, teacher: Embeddings | None) -> Tensor:
    (loss,) = objective(StepContext(student, [] if teacher is None else [teacher])).values()
    return loss


def _unit(seed: int, width: int) -> Tensor:
    return F.normalize(torch.randn(B, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _pair(seed: int, width: int, scale: float = 20.0, *, trained: bool = False) -> Embeddings:
    tensors = (_unit(seed, width), _unit(seed + 1, width), torch.tensor(scale))
    return Embeddings(*(tensor.requires_grad_(trained) for tensor in tensors))


def _maps(seed: int, places: int = 1) -> dict[str, Tensor]:
    """Of a student's heads and of a teacher's block."""
    names = ["patches.-2", *(f"{head_name(name, place)}.0" for name in OF_PATCHES for place in range(places))]
    maps = {name: torch.randn(B, 2, 2, 6, generator=torch.Generator().manual_seed(seed + place)) for place, name in enumerate(names)}
    maps |= {name: map_BhwC[..., :1].square() for name, map_BhwC in maps.items() if name.startswith("attention")}
    return maps | {f"{head_name('augmented_feature', place)}.scale": torch.tensor(14.0 + place) for place in range(places)}


def _at_cosine(target_BD: Tensor, cosine: float) -> Tensor:
    """Unit rows at one angle to those of `target_BD`."""
    other_BD = torch.randn(target_BD.shape, generator=torch.Generator().manual_seed(9))
    across_BD = F.normalize(other_BD - (other_BD * target_BD).sum(-1, keepdim=True) * target_BD, dim=-1)
    return cosine * target_BD + (1 - cosine**2) ** 0.5 * across_BD


def test_contrastive_is_torchs_cross_entropy_both_ways(recipe_file: Path) -> None:
    student = _pair(1, 16, trained=True)
    logits = student.scale * student.image @ student.text.T
    labels = torch.arange(B)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    found = _loss(_objective(recipe_file, "contrastive"), student, None)
    torch.testing.assert_close(found, expected)
    inputs = (student.image, student.text, student.scale)
    for mine, torchs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_similarity_is_torchs_kl_of_rows_and_columns(recipe_file: Path, temperature: float) -> None:
    student, teacher = _pair(1, 16), _pair(5, 24, scale=30.0)
    a = student.scale * student.image @ student.text.T / temperature
    b = teacher.scale * teacher.image @ teacher.text.T / temperature
    ways = [F.kl_div(x.log_softmax(1), y.log_softmax(1), log_target=True, reduction="batchmean") for x, y in ((a, b), (a.T, b.T))]
    found = _loss(_objective(recipe_file, "similarity", f"similarity.temperature={temperature}"), student, teacher)
    torch.testing.assert_close(found, temperature**2 * (ways[0] + ways[1]) / 2)


def test_similarity_of_a_student_that_is_its_teacher_is_zero(recipe_file: Path) -> None:
    teacher = _pair(3, 16)
    assert _loss(_objective(recipe_file, "similarity"), teacher, teacher).item() == 0.0


def test_a_fixed_student_scale_replaces_the_learned_one_and_gives_it_no_gradient(recipe_file: Path) -> None:
    student, teacher = _pair(1, 16, scale=20.0, trained=True), _pair(5, 16)
    fixed = _loss(_objective(recipe_file, "similarity", "similarity.student_scale=50"), student, teacher)
    fixed.backward()
    assert student.scale.grad is None
    assert student.image.grad is not None
    learned = _objective(recipe_file, "similarity")
    torch.testing.assert_close(fixed, _loss(learned, student._replace(scale=torch.tensor(50.0)), teacher))
    _loss(learned, student, teacher).backward()
    assert student.scale.grad is not None
    assert student.scale.grad.abs() > 0


@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("width", [8, 64, 1024])
def test_feature_is_two_minus_two_cosines_at_every_width(recipe_file: Path, width: int, cosine: float) -> None:
    teacher = _pair(5, width)
    projected = {"feature": (_at_cosine(teacher.image, cosine), _at_cosine(teacher.text, cosine))}
    found = _loss(_objective(recipe_file, "feature"), _pair(1, 16)._replace(projected=projected), teacher)
    assert found.item() == pytest.approx(2 - 2 * cosine, abs=1e-5)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("kind", "tensors"), [("linear", 2), ("mlp", 8)])
def test_a_head_projects_to_the_teachers_width_and_learns(recipe_file: Path, name: str, kind: str, tensors: int) -> None:
    objective = _objective(recipe_file, name, f"{name}.head={kind}")
    head = objective.head(ModelShape(16), ModelShape(24))
    assert head is not None
    student, teacher = _pair(1, 16, trained=True), _pair(5, 24)
    outputs = head.project(student.image, student.text, {})
    projected = {name: (outputs["image"], outputs["text"])}
    _loss(objective, student._replace(projected=projected), teacher).backward()
    gradients = [parameter.grad for parameter in head.parameters()]
    assert len(gradients) == tensors
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert student.image.grad is not None
    assert student.image.grad.abs().sum() > 0


def test_interactive_is_torchs_cross_entropy_among_the_teachers_other_modality(recipe_file: Path) -> None:
    student, teacher = _pair(1, 16), _pair(5, 24)
    queries = _unit(7, 24), _unit(8, 24)
    labels = torch.arange(B)
    ways = [F.cross_entropy(20.0 * query @ among.T, labels) for query, among in zip(queries, (teacher.text, teacher.image), strict=True)]
    found = _loss(_objective(recipe_file, "interactive"), student._replace(projected={"interactive": queries}), teacher)
    torch.testing.assert_close(found, (ways[0] + ways[1]) / 2)


def test_sigmoid_contrastive_is_open_clips_siglip_loss(recipe_file: Path) -> None:
    student = _pair(1, 16)._replace(bias=torch.tensor(-8.0))
    expected = SigLipLoss()(student.image, student.text, student.scale, student.bias)
    torch.testing.assert_close(_loss(_objective(recipe_file, "sigmoid_contrastive"), student, None), expected)


def test_sigmoid_similarity_is_cross_entropy_with_the_teachers_probabilities_less_their_entropy(recipe_file: Path) -> None:
    student, teacher = _pair(1, 16)._replace(bias=torch.tensor(-8.0)), _pair(5, 24, 30.0)._replace(bias=torch.tensor(-12.0))
    a, b = (pair.scale * pair.image @ pair.text.T + pair.bias for pair in (student, teacher))
    entropy, crossed = (F.binary_cross_entropy_with_logits(logits, b.sigmoid(), reduction="sum") for logits in (b, a))
    found = _loss(_objective(recipe_file, "sigmoid_similarity"), student, teacher)
    torch.testing.assert_close(found, (crossed - entropy) / B, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gets_no_gradient(recipe_file: Path, name: str) -> None:
    student, teacher = _pair(1, 16, trained=True), _pair(5, 16, trained=False)
    maps = {name: value.requires_grad_() for name, value in _maps(1).items()}
    student = student._replace(projected=dict.fromkeys((*HEADS, "augmented_feature"), (student.image, student.text)), features=maps)
    teacher = teacher._replace(features=_maps(7))
    loss = _loss(_objective(recipe_file, name), student, teacher)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    loss.backward()
    assert all(tensor.grad is None for tensor in (teacher.image, teacher.text, teacher.scale, *teacher.features.values()))


def test_losses_of_one_matrix_come_from_one_pass_and_are_what_they_are_alone(recipe_file: Path) -> None:
    student, teacher = _pair(1, 16)._replace(bias=torch.tensor(-8.0)), _pair(5, 24)._replace(bias=torch.tensor(-9.0))
    for first, second in (("contrastive", "similarity"), ("sigmoid_contrastive", "sigmoid_similarity")):
        weights = [f"objectives.{name}={float(name in (first, second))}" for name in NAMES]
        (both,) = build(_recipe(recipe_file, *weights), CPU)
        assert both.names == (first, second)
        for name, loss in both(StepContext(student, [teacher])).items():
            torch.testing.assert_close(loss, _loss(_objective(recipe_file, name), student, teacher))


@pytest.mark.parametrize("weights", [(), (0.5, 1.5)])
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_several_teachers_give_the_mean_of_their_losses_by_weight(recipe_file: Path, name: str, weights: tuple[float, ...]) -> None:
    widths = (16, 16) if declaration(name).one_width else (24, 20)
    student, teachers = _pair(1, 16)._replace(bias=torch.tensor(-4.0)), [_pair(5, widths[0]), _pair(7, widths[1], 35.0)]
    teachers = [teacher._replace(bias=torch.tensor(-3.0), features=_maps(seed)) for seed, teacher in enumerate(teachers)]
    queries = [(_unit(9, width), _unit(10, width)) for width in widths]
    objective = _objective(recipe_file, name)
    maps = _maps(11, places=2)
    both = student._replace(projected={head_name(name, place): pair for place, pair in enumerate(queries)}, features=maps)
    (found,) = objective(StepContext(both, teachers, weights=weights)).values()
    alone = [
        _loss(
            _objective(recipe_file, name),
            student._replace(
                projected={name: pair},
                features={f"{name}{end}": maps.get(f"{head_name(name, place)}{end}", torch.empty(0)) for end in (".0", ".scale")},
            ),
            teacher,
        )
        for place, (teacher, pair) in enumerate(zip(teachers, queries, strict=True))
    ]
    share = 0.25 if weights else 0.5
    torch.testing.assert_close(found, share * alone[0] + (1 - share) * alone[1])


def test_the_task_builds_a_head_for_each_teacher_in_its_width(recipe_file: Path) -> None:
    objectives = ObjectiveSet(_recipe(recipe_file, "objectives.feature=1", "teacher.model=ViT-B-32"), CPU, None)
    heads = objectives.heads(ModelShape(16), [ModelShape(24), ModelShape(20)])
    assert {name: head.image.weight.shape for name, head in heads.items()} == {"feature": (24, 16), "feature1": (20, 16)}


def test_the_kernels_section_chooses_the_backend_and_the_task_says_which(recipe_file: Path) -> None:
    weights = ("objectives.similarity=1", "objectives.feature=1", "teacher.model=ViT-B-32", "teacher.pretrained=random")
    assert ObjectiveSet(_recipe(recipe_file, *weights), CPU, None).backends == {"contrastive": "eager", "similarity": "eager"}
    chunked = ObjectiveSet(_recipe(recipe_file, *weights, "kernels.backend=chunked"), CPU, None)
    assert chunked.backends == {"contrastive": "chunked", "similarity": "chunked"}
    with pytest.raises(ValueError, match=r"kernels\.backend = 'triton': backend 'triton' cannot run here: it needs a CUDA device"):
        ObjectiveSet(_recipe(recipe_file, *weights, "kernels.backend=triton"), CPU, None)


def test_sigmoid_objectives_are_refused_for_a_model_without_a_bias(recipe_file: Path) -> None:
    objectives = ObjectiveSet(_recipe(recipe_file, "objectives.sigmoid_contrastive=1"), CPU, None)
    objectives.check_bias("student", True)
    with pytest.raises(ValueError, match=r"objectives\.sigmoid_contrastive: the student has no logit bias.*init_logit_bias"):
        objectives.check_bias("student", False)


def test_the_task_weighs_what_it_logs_unweighted(recipe_file: Path) -> None:
    recipe = _recipe(recipe_file, "objectives.similarity=3", "objectives.feature=0.5", "teacher.model=ViT-B-32")
    objectives = ObjectiveSet(recipe, CPU, None)
    student, teacher = _pair(1, 16), _pair(5, 16)
    losses = objectives.losses(student._replace(projected={"feature": (student.image, student.text)}), [teacher])
    assert list(losses) == list(objectives.weights) == ["contrastive", "similarity", "feature"]
    total = weighted_sum(losses, objectives.weights)
    torch.testing.assert_close(total, losses["contrastive"] + 3 * losses["similarity"] + 0.5 * losses["feature"])


def test_an_objective_of_weight_zero_is_left_out_with_its_head(recipe_file: Path) -> None:
    objectives = ObjectiveSet(_recipe(recipe_file, "objectives.feature=0.0"), CPU, None)
    assert not objectives.needs_teacher
    assert objectives.heads(ModelShape(16), [ModelShape(24)]) == {}
    assert set(objectives.losses(_pair(1, 16), [])) == {"contrastive"}


def test_an_objective_that_needs_a_teacher_is_refused_without_one(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match=r"objectives\.similarity, objectives\.feature: needs a teacher.*\[teacher\]"):
        ObjectiveSet(_recipe(recipe_file, "objectives.similarity=1", "objectives.feature=1"), CPU, None)


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_costs_more_than_nothing_in_the_plan(recipe_file: Path, name: str) -> None:
    models = ModelShape(8, BLOCKS), ModelShape(16, BLOCKS)
    shape = cost.LossShape(64, 4, (8, 16), (2, 2), 1, False, CPU, models)
    of_one = _objective(recipe_file, name).cost(shape)
    assert of_one.memory > 0
    assert of_one.flops > 0


class Drift(Objective):
    """A loss with a memory: how far the batch's mean image embedding is from that of the batches before."""

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        (name,), mean_D = self.names, context.student.image.float().mean(dim=0)
        before_D = self.state.get("mean", torch.zeros_like(mean_D))
        self.state["mean"] = (before_D + mean_D.detach()) / 2
        self.state["step"] = torch.tensor(context.step)
        return {name: (mean_D - before_D).square().sum()}


@pytest.fixture
def drift(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectiveSet:
    """The set of a recipe whose `feature` is computed by Drift."""
    monkeypatch.setattr("megakd.objectives.feature.Feature", Drift)
    return ObjectiveSet(_recipe(recipe_file, "objectives.feature=1", "teacher.model=ViT-B-32"), CPU, None)


def test_an_objective_whose_cost_nobody_counted_is_planned_as_eager(drift: ObjectiveSet, recipe_file: Path) -> None:
    shape = cost.LossShape(64, 4, (8, 16), (2, 2), 1, False, CPU)
    alone = ObjectiveSet(_recipe(recipe_file), CPU, None).cost(shape)
    assert drift.cost(shape).memory - alone.memory == cost.of_kernel(cost.SOFTMAX_KD, "eager", shape).memory > 10 * 4 * 64**2


def test_an_objective_is_told_the_step_and_goes_on_with_its_state(drift: ObjectiveSet, recipe_file: Path) -> None:
    students, teacher = [_pair(seed, 16) for seed in (1, 11, 21)], _pair(5, 16)
    undisturbed = [drift.losses(student, [teacher], step)["feature"] for step, student in enumerate(students)]
    first, second = (ObjectiveSet(_recipe(recipe_file, "objectives.feature=1", "teacher.model=ViT-B-32"), CPU, None) for _ in range(2))
    for step, student in enumerate(students[:2]):
        first.losses(student, [teacher], step)
    kept = first.state()
    assert kept["feature.step"] == 1
    second.restore(kept)
    assert torch.equal(second.losses(students[2], [teacher], 2)["feature"], undisturbed[2])


def test_the_state_of_an_objective_that_is_not_active_is_refused(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match=r"objectives\.feature: the checkpoint has its state 'mean', and the recipe gives it no weight"):
        ObjectiveSet(_recipe(recipe_file), CPU, None).restore({"feature.mean": torch.zeros(4)})
