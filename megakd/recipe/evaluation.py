"""On what a run is scored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, model_validator

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

    train: str = Field(
        description="labelled images, .jpg and .cls: shards, or a folder whose train/*.tar they are, as CLIP_benchmark's; or a folder with "
        "class folders of images, or whose train/ has them"
    )
    test: str = Field(
        description="those that count: shards, or a folder whose test/*.tar they are; or class folders, in it or in its val/ or test/"
    )
    layer: int = Field(-2, ge=-1000, le=1000, description="the vision tower's block whose patch tokens are averaged, as decoder.layer")
    neighbours: Positive = Field(20, description="training images that vote; all where there are fewer")
    temperature: PositiveFloat = Field(0.07, description="a vote weighs exp(cosine / temperature)")


class CaptionFiles(Section):
    """A retrieval set whose images are files of a folder."""

    annotations: str = Field(
        description="Karpathy's JSON (dataset_coco.json, dataset_flickr30k.json) or COCO's captions (captions_val2017.json)"
    )
    images: str = Field(description="the folder that the names of the images begin in")
    split: str | None = Field(None, description="of Karpathy's JSON: test (the default), val, train or restval")


class NegativeFiles(Section):
    """Hard negatives of images that are files of a folder."""

    annotations: str | list[str] = Field(
        min_length=1,
        description="files, or a folder of them: SugarCrepe's, ARO's relation and attribution, or the test cases of its orders; kinds are "
        "the files' names, the relations, the pairs of attributes",
    )
    images: str = Field(description="the folder that the names of the images begin in")


Files = TypeVar("Files", CaptionFiles, NegativeFiles)


def _shards_or(files: type[Files]) -> BeforeValidator:
    """One message for what is neither shards nor a table, and the table's own messages for a table."""

    def read(value: Any) -> Any:
        if isinstance(value, dict):
            return files.model_validate(value)
        if not isinstance(value, str | files):
            raise ValueError("give shards as text, or a table with annotations and images")
        return value

    return BeforeValidator(read)


class Evaluation(Section):
    """Evaluation sets by name; shard patterns are written as in data.train."""

    every: NonNegative = Field(0, description="steps between evaluations; 0 evaluates at the end alone")
    weights: Literal["current", "ema", "both"] = Field(
        "current", description="what is scored: the weights of the step, their average (optim.ema), or both, the average's under `ema`"
    )
    batch: int = Field(256, gt=0, le=10**6, description="images, or texts, that a rank encodes at once")
    zero_shot: dict[SetName, str] = Field(
        default_factory=dict,
        description="folders as CLIP_benchmark's: classnames.txt, zeroshot_classification_templates.txt, test/*.tar with .jpg and .cls; or "
        "with a folder of images for each class, as ImageNet's val/CLASS/*.JPEG",
    )
    retrieval: dict[SetName, Annotated[str | CaptionFiles, _shards_or(CaptionFiles)]] = Field(
        default_factory=dict,
        description="each caption among all images, and back: shards of pairs, or a table of files as { annotations, images }",
    )
    hard_negatives: dict[SetName, Annotated[str | NegativeFiles, _shards_or(NegativeFiles)]] = Field(
        default_factory=dict,
        description='scored by kind, of any names: shards whose samples have in their .json {"negatives": {KIND: FALSE CAPTION, or a list '
        "of some, ...}}, or a table of files as { annotations, images }",
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
