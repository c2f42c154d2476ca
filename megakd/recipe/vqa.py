"""The sections about questions: the decoder that answers them, its adapters, and where questions come from."""

from __future__ import annotations

import math
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from megakd.recipe.section import SCHEDULED_WEIGHT, Fraction, Name, Positive, PositiveFloat, ScheduledTemperature, ScheduledWeight, Section
from megakd.recipe.sources import SourceWeight, check_weights

# A benchmark is one file of vqa/benchmarks: its name there is its format here. Names alone, nothing is imported.
BENCHMARKS = tuple(
    sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / "vqa" / "benchmarks")]) if module.name != "base")
)
if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[(*BENCHMARKS, "captions")]


CHAT = "chat"  # as decoder.template
ImageFit = Literal["tower", "pad", "squash"]


class Lora(Section):
    """Low-rank adapters on the decoder's linear layers (arXiv 2106.09685), through peft."""

    rank: int = Field(16, gt=0, le=2**16, description="width of the two factors that are added to each adapted layer's weight")
    alpha: PositiveFloat = Field(32.0, description="the adapter's output is scaled by alpha / rank")
    dropout: Fraction = Field(0.05, description="fraction of an adapter's inputs set to 0 in training")
    targets: Literal["linear"] | list[str] = Field(
        "linear",
        description="linear: every Linear layer of the language model but its output layer; or names of layers, e.g. ['q_proj', 'v_proj']",
    )


def check_image_tokens(image_tokens: int) -> None:
    """Raises ValueError for a number of tokens that no square grid has."""
    root = math.isqrt(image_tokens)
    if root * root != image_tokens:
        raise ValueError(f"image_tokens = {image_tokens}: a square number (1, 4, 9, ...), or 0 for every patch")


class Decoder(Section):
    """A causal language model that reads image tokens: the student's patch tokens, pooled and projected to its width."""

    model: str | None = Field(None, description="any AutoModelForCausalLM: a Hugging Face name, or a folder")
    architecture: dict[str, Any] | None = Field(
        None, description="a transformers configuration: model_type, hidden_size, num_hidden_layers, ..."
    )
    tokenizer: str | None = Field(None, description="folder of a Hugging Face tokenizer; default: the model's own")
    adapt: Literal["lora", "none", "full"] = Field("lora", description="what of the language model is trained; the projector always is")
    lora: Lora = Lora()
    quantise: Literal["none", "int8", "nf4"] = Field("none", description="hold the frozen weights in 8 or 4 bit by bitsandbytes")
    image_tokens: int = Field(
        0, ge=0, le=10**6, description="tokens an image becomes: a square number, averaged over a grid; 0: every patch is one"
    )
    layer: int = Field(-2, ge=-1000, le=1000, description="the vision tower's block whose output is read; -1 is the last, LLaVA takes -2")
    image_fit: ImageFit = Field(
        "tower",
        description="how a question's picture gets the tower's size. tower: as its preprocessing says, which often crops it; pad: whole, "
        "with a border of the mean colour (LLaVA's image_aspect_ratio); squash: both sides resized",
    )
    template: str = Field(
        "USER: {question} ASSISTANT: ",
        description="what the decoder is given; the image tokens come before it. chat: the tokenizer's own chat template, with the image "
        "tokens at the start of the user's turn; the token by which it ends an answer is learned and ends answers",
    )
    instruction: str = Field(
        "\nAnswer the question using a single word or phrase.", description="follows each question of a set with short answers"
    )
    start: str | None = Field(None, description="bundle of an earlier run (RUN/bundle): its projector and adapter are gone on with")
    recipe: str | None = Field(None, description="recipe that trains what `model` or `start` names first, when it is not there yet")

    @model_validator(mode="after")
    def _one_source(self) -> Decoder:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give either `model` (a name or a folder) or `architecture` (a table), not both and not neither")
        if self.quantise != "none" and self.adapt == "full":
            raise ValueError(f"quantise = {self.quantise!r} holds frozen weights: set adapt to 'lora' or 'none', it is 'full'")
        if self.recipe is not None and self.start is None and not (self.model or "").endswith("/bundle/language"):
            raise ValueError(
                f"recipe = {self.recipe!r} trains into a run folder: give start = 'RUN/bundle' or model = 'RUN/bundle/language' of that run"
            )
        if "{question}" not in self.template and self.template != CHAT:
            raise ValueError(f"template = {self.template!r}: it must hold {{question}}, or be '{CHAT}' for the tokenizer's chat template")
        check_image_tokens(self.image_tokens)
        return self


class QuestionSource(Section):
    """Questions with answers and images, in the files their benchmark publishes."""

    format: Format = Field(
        description="vqav2 is OK-VQA's too; llava: conversations, also without images; captions: shards, the caption is the answer"
    )
    questions: str | None = Field(None, description="the questions' file; captions have none")
    annotations: str | None = Field(None, description="vqav2: the file of the answers")
    images: str | None = Field(None, description="a folder of image files, or image-text shards (*.tar); none: text alone")
    image_name: str | None = Field(
        None,
        description="file name or shard key from the entry's fields, e.g. 'COCO_val2014_{image_id:012d}.jpg'; default: the benchmark's",
    )
    split: str | None = Field(None, description="scienceqa: train, val or test, by its own pid_splits.json beside the file")
    plain: bool = Field(False, description="llava: nothing is asked, the reply is the image's caption, as in LLaVA's first stage")


class LearnedQuestions(QuestionSource):
    """Questions to learn, one of several sources perhaps."""

    weight: SourceWeight = None


class LearningRates(Section):
    """Peak learning rates by group; all follow optim's schedule."""

    tower: PositiveFloat | None = Field(None, description="of the student's vision tower; default: optim.lr")
    projector: PositiveFloat | None = Field(None, description="of the projector from patch to image tokens; default: optim.lr")
    decoder: PositiveFloat | None = Field(None, description="of the adapters, or of a language model trained whole; default: optim.lr")


class AnswerTeacher(Section):
    """A decoder that was trained before, frozen: its probabilities of the answers' tokens are learned beside the answers."""

    bundle: str = Field(description="folder of its bundle (RUN/bundle), by any tower and of any size, but of the decoder's own vocabulary")
    weight: Annotated[PositiveFloat, SCHEDULED_WEIGHT] = Field(
        1.0, description="of the divergence (answer_kl) beside the answer loss and the objectives"
    )
    divergence: Literal["forward", "reverse", "js"] = Field(
        "forward", description="forward: KL(teacher, student); reverse: KL(student, teacher); js: Jensen-Shannon's, symmetric"
    )
    temperature: ScheduledTemperature = Field(1.0, description="t, divides both models' logits; the divergence is multiplied by t squared")
    quantise: Literal["none", "int8", "nf4"] | None = Field(
        None, description="hold its language model's weights in 8 or 4 bit by bitsandbytes; default: as in its own run"
    )
    recipe: str | None = Field(None, description="recipe that trains the teacher first when `bundle` is not there yet")

    @model_validator(mode="after")
    def _bundle_of_a_run(self) -> AnswerTeacher:
        if self.recipe is not None and Path(self.bundle).name != "bundle":
            raise ValueError(
                f"recipe = {self.recipe!r} trains into a run folder: bundle must be 'RUN/bundle' of that run, not {self.bundle!r}"
            )
        return self


class Answers(Section):
    """The decoder learns to answer. With active objectives alongside them, in the same step; without, alone."""

    train: dict[Name, LearnedQuestions] = Field(
        min_length=1, description="by name; all are shuffled together, in proportion to their size; with weights they are mixed by these"
    )
    weight: ScheduledWeight = Field(1.0, description="of the answer loss beside the objectives; 0 learns from [answers.teacher] alone")
    batch: Positive | None = Field(None, description="questions in one step, over all ranks; default: optim.batch")
    max_length: int = Field(512, gt=0, le=10**7, description="tokens of a conversation, image tokens included; further turns are dropped")
    tower: Literal["frozen", "trained"] = Field("frozen", description="whether the answers' gradient reaches the vision tower")
    lr: LearningRates = LearningRates()
    teacher: AnswerTeacher | None = Field(None, description="a trained decoder whose answers' probabilities are learned, too")

    @field_validator("train")
    @classmethod
    def _weights(cls, train: dict[str, LearnedQuestions]) -> dict[str, LearnedQuestions]:
        check_weights({name: source.weight for name, source in train.items()})
        return train

    @model_validator(mode="after")
    def _learns_something(self) -> Answers:
        if self.weight == 0 and self.teacher is None:
            raise ValueError("weight = 0 without [answers.teacher]: nothing would be learned of the answers; give a weight above 0")
        return self
