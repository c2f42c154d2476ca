"""On what a run is scored."""

from __future__ import annotations

from pydantic import Field, model_validator

from megakd.recipe.section import Name, NonNegative, Positive, PositiveFloat, Section, SetName
from megakd.recipe.vqa import QuestionSource, check_image_tokens


class Reader(Section):
    """A question reader over the frozen tower's patch tokens, which chooses among the training set's most frequent answers.

    It is trained and scored at the end of a run, not at each evaluation.every, and by `megakd evaluate`.
    """

    train: QuestionSource = Field(description="questions that it learns, with answers and images")
    test: QuestionSource = Field(description="questions that it is scored on, by their benchmark's rules")
    answers: int = Field(3000, gt=1, le=10**5, description="most frequent training answers, among which it chooses")
    layer: int = Field(-2, ge=-1000, le=1000, description="the vision tower's block whose output is read, as decoder.layer")
    image_tokens: int = Field(
        0, ge=0, le=10**6, description="tokens an image becomes, as decoder.image_tokens: a square number; 0: every patch is one"
    )
    width: int = Field(64, gt=0, le=4096, multiple_of=4, description="of its word and image states; 4 attention heads share it")
    steps: Positive = Field(1000, description="of its training: AdamW, a warm-up of a tenth, then a cosine to 0")
    batch: Positive = Field(128, description="questions of a step, and those answered at once")
    lr: PositiveFloat = Field(3e-3, description="peak learning rate")
    blind: bool = Field(False, description="train a second one that sees no image, and score it beside the first")
    seed: NonNegative = Field(0, description="of its first weights and the order of its questions; the run's seed has no part in it")

    @model_validator(mode="after")
    def _square(self) -> Reader:
        check_image_tokens(self.image_tokens)
        return self


class Probe(Section):
    """A linear classifier and the nearest neighbours' vote on the frozen tower's features, at the end of a run as a reader."""

    train: str = Field(description="labelled images, .jpg and .cls: shards, or a folder whose train/*.tar they are, as CLIP_benchmark's")
    test: str = Field(description="those that count: shards, or a folder whose test/*.tar they are")
    layer: int = Field(-2, ge=-1000, le=1000, description="the vision tower's block whose patch tokens are averaged, as decoder.layer")
    neighbours: Positive = Field(20, description="training images that vote; all where there are fewer")
    temperature: PositiveFloat = Field(0.07, description="a vote weighs exp(cosine / temperature)")


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
    reader: dict[Name, Reader] = Field(
        default_factory=dict, description="question readers over the tower's patch tokens, at the end of a run; without a decoder"
    )
    probe: dict[Name, Probe] = Field(default_factory=dict, description="linear probe and k-NN of images with labels, at the end of a run")
    vqa_batch: int = Field(64, gt=0, le=10**6, description="questions answered at once")
    answer_tokens: int = Field(10, gt=0, le=10**6, description="longest answer that the decoder generates")
