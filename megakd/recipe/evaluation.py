"""On what a run is scored."""

from __future__ import annotations

from pydantic import Field

from megakd.recipe.section import Name, NonNegative, Section, SetName
from megakd.recipe.vqa import QuestionSource


class Evaluation(Section):
    """Evaluation sets by name; shard patterns are written as in data.train."""

    every: NonNegative = Field(0, description="steps between evaluations; 0 evaluates at the end alone")
    batch: int = Field(256, gt=0, le=10**6, description="images, or texts, that a rank encodes at once")
    zero_shot: dict[SetName, str] = Field(
        default_factory=dict,
        description="folders as CLIP_benchmark's: classnames.txt, zeroshot_classification_templates.txt, test/*.tar with .jpg and .cls",
    )
    retrieval: dict[SetName, str] = Field(default_factory=dict, description="shards of pairs: each caption among all images, and back")
    hard_negatives: dict[SetName, str] = Field(
        default_factory=dict,
        description='shards whose samples have in their .json {"negatives": {KIND: FALSE CAPTION, ...}}; scored by kind, of any names',
    )
    diagnostics: dict[SetName, str] = Field(
        default_factory=dict, description="shards of pairs that student and teacher are compared on: likeness of embeddings, not scores"
    )
    vqa: dict[Name, QuestionSource] = Field(default_factory=dict, description="questions for the decoder, as in answers.train")
    vqa_batch: int = Field(64, gt=0, le=10**6, description="questions answered at once")
    answer_tokens: int = Field(10, gt=0, le=10**6, description="longest answer that the decoder generates")
