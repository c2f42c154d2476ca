"""The losses on image-text pairs: each one's weight and options, what it needs, and the class that computes it.

A new loss is a field of `Objectives`, a section of `ObjectiveSections` where it has options, and a class in `megakd/objectives/`, whose
README says how. Nothing else lists the losses: the trainer, the planner and the rules of resuming read this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from megakd.recipe.section import (
    SCHEDULED_TEMPERATURE,
    Block,
    HeadKind,
    Positive,
    PositiveFloat,
    ScheduledTemperature,
    ScheduledWeight,
    Section,
    StudentScale,
    Weight,
)


@dataclass(frozen=True)
class Declaration:
    """What is known of a loss before torch is imported.

    where: dotted name of the class, an `Objective` of `megakd/objectives/base.py`. Losses of one class that are active together may share
    their products.
    needs_bias: of student and teachers, the logit bias of models trained with a sigmoid loss.
    one_width: embeddings of student and teachers are compared as they are, number by number.
    compares_rows: with a teacher's softmaxes over the rows of the similarity matrix, whose entropy its scale can be matched by.
    needs_text: of the teachers it is called with, a text tower; others are left out of it.
    """

    where: str
    needs_teacher: bool = True
    needs_bias: bool = False
    one_width: bool = False
    compares_rows: bool = False
    needs_text: bool = True


_SOFTMAX, _SIGMOID = "megakd.objectives.softmax.Softmax", "megakd.objectives.sigmoid.Sigmoid"


class Objectives(Section):
    """name = weight; 0 leaves an objective out."""

    contrastive: Annotated[Weight, Declaration(_SOFTMAX, needs_teacher=False)] = Field(0.0, description="CLIP's InfoNCE, without a teacher")
    similarity: Annotated[Weight, Declaration(_SOFTMAX, compares_rows=True)] = Field(
        0.0, description="similarity-matrix KD, see [similarity]"
    )
    sigmoid_contrastive: Annotated[Weight, Declaration(_SIGMOID, needs_teacher=False, needs_bias=True)] = Field(
        0.0, description="SigLIP's loss, without a teacher; for models with a logit bias"
    )
    sigmoid_similarity: Annotated[Weight, Declaration(_SIGMOID, needs_bias=True)] = Field(
        0.0, description="the same with the teacher's probabilities as labels"
    )
    interactive: Annotated[Weight, Declaration("megakd.objectives.interactive.Interactive")] = Field(
        0.0, description="interactive contrastive learning, see [interactive]"
    )
    cross: Annotated[Weight, Declaration("megakd.objectives.interactive.Cross", compares_rows=True)] = Field(
        0.0, description="the same queries learn the teacher's distribution over its own embeddings, see [cross]"
    )
    feature: Annotated[Weight, Declaration("megakd.objectives.feature.Feature", needs_text=False)] = Field(
        0.0, description="feature KD, see [feature]"
    )
    masked_feature: Annotated[Weight, Declaration("megakd.objectives.feature.MaskedFeature", needs_text=False)] = Field(
        0.0, description="feature KD from masked images, see [masked_feature]"
    )
    augmented_feature: Annotated[Weight, Declaration("megakd.objectives.interactive.AugmentedFeature")] = Field(
        0.0, description="InfoNCE of embeddings that are fused with the teacher's, see [augmented_feature]"
    )
    patch: Annotated[Weight, Declaration("megakd.objectives.patch.Patch", needs_text=False)] = Field(
        0.0, description="patch tokens' KD, see [patch]"
    )
    patch_relation: Annotated[Weight, Declaration("megakd.objectives.patch.PatchRelation", needs_text=False)] = Field(
        0.0, description="KD of the cosines between an image's patch tokens, see [patch_relation]"
    )
    attention: Annotated[Weight, Declaration("megakd.objectives.attention.AttentionTransfer", needs_text=False)] = Field(
        0.0, description="attention transfer: maps of where in an image the vision tower looks, see [attention]"
    )
    gradient: Annotated[Weight, Declaration("megakd.objectives.gradient.Gradient", one_width=True, compares_rows=True)] = Field(
        0.0, description="InfoNCE's gradients in the embeddings, compared with the teacher's; for towers of one width"
    )
    rkd: Annotated[Weight, Declaration("megakd.objectives.rkd.Relational")] = Field(
        0.0, description="distances and angles between a batch's embeddings are the teacher's, see [rkd]"
    )
    dist: Annotated[Weight, Declaration("megakd.objectives.dist.Dist", compares_rows=True)] = Field(
        0.0, description="correlation of the softmaxes' rows and columns with the teacher's, see [dist]"
    )
    dkd: Annotated[Weight, Declaration("megakd.objectives.dkd.Decoupled", compares_rows=True)] = Field(
        0.0, description="similarity-matrix KD with a weight for each pair's own match and one for all others, see [dkd]"
    )
    standardised: Annotated[Weight, Declaration("megakd.objectives.standardised.Standardised")] = Field(
        0.0, description="similarity-matrix KD on z-scores, whatever the two logit scales, see [standardised]"
    )


def declaration(name: str) -> Declaration:
    """What the field `name` of `Objectives` declares."""
    return next(part for part in Objectives.model_fields[name].metadata if isinstance(part, Declaration))


class Similarity(Section):
    """Similarity-matrix KD: KL divergence of the two towers' softmaxes over rows and columns."""

    temperature: ScheduledTemperature = Field(1.0, description="divides the student's logits; the loss is multiplied by its square")
    teacher_temperature: Annotated[PositiveFloat | None, SCHEDULED_TEMPERATURE] = Field(
        None, description="divides the teacher's logits; default: temperature"
    )
    student_scale: PositiveFloat | None = Field(None, description="fixed logit scale; default: the learned one")


class Interactive(Section):
    """Interactive contrastive learning: projected student embeddings as queries among the teacher's of the other modality."""

    head: HeadKind = "auto"
    scale: StudentScale = "student"


class Cross(Interactive):
    """Cross-KD: as [interactive], with the softmax of the teacher's own embedding in place of the pair's label."""


class Feature(Section):
    """Feature KD: squared distance of the projected student embedding to the teacher's, both normalised."""

    head: HeadKind = "auto"


class MaskedFeature(Section):
    """Feature KD where the student sees a part of the image alone, and the teacher all of it."""

    ratio: float = Field(0.75, gt=0.0, lt=1.0, allow_inf_nan=False, description="share of an image's patches that is masked, at random")
    head: HeadKind = "auto"


class AugmentedFeature(Section):
    """Augmented feature distillation: InfoNCE where each embedding is a trained fusion of the student's and the teacher's."""

    scale: StudentScale = "own"


class PatchRelation(Section):
    """Cosines between all patch tokens of an image: the student's are to be the teacher's, whatever the widths."""

    blocks: list[Block] = Field([-2], min_length=1, description="of the student's vision tower; -1 is the last")
    teacher_blocks: list[Block] | None = Field(None, description="of the teachers', one for each of blocks; default: the same numbers")

    @property
    def read_blocks(self) -> list[int]:
        """Those of the teachers' vision towers that are read."""
        return self.teacher_blocks or self.blocks

    @property
    def reads_tokens(self) -> bool:
        """Whether what is read of a block is its patch tokens, which a store may hold."""
        return True

    @model_validator(mode="after")
    def _in_pairs(self) -> Self:
        if self.teacher_blocks is not None and len(self.teacher_blocks) != len(self.blocks):
            raise ValueError(
                f"teacher_blocks = {self.teacher_blocks}: give one for each of blocks = {self.blocks}, which they are compared with"
            )
        if len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"blocks = {self.blocks}: name each block once")
        return self


class Patch(PatchRelation):
    """Dense feature KD: the student's projected patch tokens against the teacher's, on the smaller of the two grids."""

    head: Literal["none", "linear", "mlp"] = Field("linear", description="projection of each pair's tokens to the teacher's width")
    loss: Literal["cosine", "smooth_l1", "mse"] = Field("cosine", description="of a token; the latter two average over channels")
    standardise: Literal["none", "channel", "phi_s"] = Field(
        "none", description="the teacher's tokens: each channel to unit variance, or all alike by a rotation (PHI-S)"
    )
    statistics: Positive = Field(10, description="batches at the start of the run that the statistics of standardise come from")


class Attention(PatchRelation):
    """Attention transfer: how strongly each patch of an image is represented, or attended to, compared with the teacher's."""

    map: Literal["activation", "weights"] = Field(
        "activation",
        description="activation: squares of a block's patch tokens, of any tower; weights: the softmax of a ViT's block, from its class "
        "token to the patches, the last block's where blocks is not given",
    )
    loss: Literal["squared", "norm", "kl"] = Field(
        "squared", description="of two maps: squared or plain L2 distance at unit norm, or the KL divergence from the teacher's at unit sum"
    )

    @property
    def reads_tokens(self) -> bool:
        return self.map == "activation"

    @model_validator(mode="before")
    @classmethod
    def _of_the_last_block(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("map") == "weights" and "blocks" not in given:
            return {**given, "blocks": [-1]}
        return given


class Relational(Section):
    """Relational KD: distances and angles among the embeddings of a modality."""

    on: Literal["image", "text", "both"] = Field("both", description="the embeddings compared; both: the mean of the two losses")
    distance: ScheduledWeight = Field(25.0, description="weight of the distances, each over their mean")
    angle: ScheduledWeight = Field(50.0, description="weight of the angles; N^3 work for N pairs, so 0 for batches beyond about a thousand")

    @model_validator(mode="after")
    def _compares_something(self) -> Self:
        if not self.distance and not self.angle:
            raise ValueError("distance and angle are both 0, and nothing is compared: give one a weight, or set objectives.rkd to 0")
        return self


class Dist(Section):
    """DIST: correlation of the two towers' softmaxes, line by line."""

    temperature: ScheduledTemperature = Field(1.0, description="divides both towers' logits")
    beta: ScheduledWeight = Field(1.0, description="weight of a softmax's own line")
    gamma: ScheduledWeight = Field(1.0, description="weight of the lines across")

    @model_validator(mode="after")
    def _compares_something(self) -> Self:
        if not self.beta and not self.gamma:
            raise ValueError("beta and gamma are both 0, and nothing is compared: give one a weight, or set objectives.dist to 0")
        return self


class Decoupled(Section):
    """Decoupled KD: KL divergence of the two towers' softmaxes in two parts; the defaults are the authors' for CIFAR-100."""

    temperature: ScheduledTemperature = Field(4.0, description="divides both towers' logits")
    alpha: ScheduledWeight = Field(1.0, description="weight of the probability that a pair matches")
    beta: ScheduledWeight = Field(8.0, description="weight of the softmax over all other pairs")

    @model_validator(mode="after")
    def _compares_something(self) -> Self:
        if not self.alpha and not self.beta:
            raise ValueError("alpha and beta are both 0, and nothing is compared: give one a weight, or set objectives.dkd to 0")
        return self


class Standardised(Section):
    """Similarity-matrix KD on the z-scores of each row and column."""

    temperature: ScheduledTemperature = Field(2.0, description="divides both towers' z-scores; the paper's base temperature")


class ObjectiveSections(Section):
    """The part of a recipe that says what is learned from pairs: the weights, then one section for each loss that has options."""

    objectives: Objectives = Objectives()
    similarity: Similarity = Similarity()
    interactive: Interactive = Interactive()
    cross: Cross = Cross()
    feature: Feature = Feature()
    masked_feature: MaskedFeature = MaskedFeature()
    augmented_feature: AugmentedFeature = AugmentedFeature()
    patch: Patch = Patch()
    patch_relation: PatchRelation = PatchRelation()
    attention: Attention = Attention()
    rkd: Relational = Relational()
    dist: Dist = Dist()
    dkd: Decoupled = Decoupled()
    standardised: Standardised = Standardised()


AnyRecipe = TypeVar("AnyRecipe", bound=ObjectiveSections)


def with_heads_of(earlier: ObjectiveSections, recipe: AnyRecipe) -> AnyRecipe:
    """`recipe` with the heads that `earlier`, which a run has begun with, names where `recipe` leaves their kind to "auto"."""
    kept: dict[str, Section] = {}
    for name in ObjectiveSections.model_fields:
        began, section = getattr(earlier, name), getattr(recipe, name)
        if getattr(section, "head", None) == "auto" != began.head:
            kept[name] = section.model_copy(update={"head": began.head})
    return recipe.model_copy(update=kept) if kept else recipe


def keys() -> list[str]:
    """Every key of these sections: `objectives.feature` and `feature.head` are two."""
    return [f"{name}.{key}" for name, section in ObjectiveSections() for key in type(section).model_fields]
