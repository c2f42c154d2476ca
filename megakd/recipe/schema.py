"""A recipe says what is learned: data, models, objectives, optimisation. One frozen, typed tree; no other module has defaults.

How a run is carried out (ZeRO stage, precision, micro-batch, monitors) is in the DeepSpeed JSON, see `runtime/ds_config.py`. Recipes are
read and compared in `load.py`; the models are in `models.py`, the losses in `objectives.py`, what of them moves over a run in
`schedules.py`, AdamW in `optim.py`, names of a student's parts in `parts.py`, the augmentation in `views.py`, the sections about questions
in `vqa.py`, what is scored in `evaluation.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from megakd.recipe import best, learns, start
from megakd.recipe.best import BestScore
from megakd.recipe.captions import CaptionSource, CaptionWeights, CleanSteps, check_member, shares
from megakd.recipe.evaluation import Evaluation
from megakd.recipe.models import IN_SHARDS, Student, Teacher
from megakd.recipe.objectives import PatchRelation, declaration
from megakd.recipe.schedules import ScheduledSections
from megakd.recipe.section import (
    MATCHED,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Section,
    Weight,
)
from megakd.recipe.sources import PairSource, patterns_or_sources
from megakd.recipe.views import Views
from megakd.recipe.vqa import Answers, Decoder

Resampling = Literal["pillow", "torch"]


class Data(Section):
    """Image-text shards: tars of `.jpg` and `.txt` members, as img2dataset writes them."""

    train: Annotated[str | list[str] | dict[Name, PairSource] | None, BeforeValidator(patterns_or_sources)] = Field(
        None,
        min_length=1,
        description="paths or URLs; braces expand, '::' joins; or a table of sources by name, mixed by their weights; the objectives need "
        "it, answers alone do not",
    )
    caption: str = Field("txt", description="extension of the caption's member in the tar")
    captions: CaptionWeights | None = Field(
        None,
        description='in its place, several with weights: { txt = 0.5, "json:re_caption" = 0.5 }; one is drawn each time a pair is read, of '
        "those that the sample has. Not for evaluation sets and answers, which read .txt",
    )
    clean: CleanSteps = Field(
        [],
        description="of captions that objectives learn from: tags and urls take HTML tags and addresses out, lower writes small letters",
    )
    workers: int = Field(2, ge=0, le=1024, description="decoding processes of each rank; 0 decodes in the trainer's own")
    prefetch: bool = Field(
        False,
        description="prepare the next batch while the device works on a step, on a stream of its own: moved, and with what teachers say of "
        "it. Off, as that takes its memory beside the student's: `megakd plan` counts it",
    )
    block: Positive = Field(64, description="consecutive samples that the shuffle keeps together until the last stage")
    window: Positive = Field(256, description="blocks that are mixed with each other; block * window samples are shuffled as one")
    max_bad_fraction: Fraction = Field(0.01, description="the run fails when more of the samples seen are unreadable")
    max_pixels: int = Field(50_000_000, gt=0, le=10**12, description="a larger image is refused before it is decoded")
    orientation: Literal["exif", "ignore"] = Field(
        "exif", description="exif: images are turned upright; ignore: left as stored, as open_clip does. In training, stores, sets, answers"
    )
    transparency: Literal["white", "black", "drop"] = Field(
        "white", description="what shows through; drop: pixels keep the colour that lay hidden, as open_clip does. Where orientation counts"
    )
    decode: Literal["full", "scaled"] = Field(
        "full",
        description="of pairs, not of evaluation and answers; scaled: a JPEG is decoded at 1/2, 1/4 or 1/8 of its sides where its crop is "
        "larger than a tower's input by that, which changes pixels",
    )
    resampling: Resampling = Field(
        "pillow",
        description="what resizes crops of pairs; torch: two to five times as fast with vector instructions, within a level of 255 of "
        "torchvision's crop and resize of a PIL image (two where it enlarges)",
    )
    cache: str | None = Field(None, description="folder for the shards' indexes and for local copies of remote shards")

    def as_seen(self) -> dict[str, str]:
        """How images become RGB, where that is not the default: a part of what stores and bundles depend on."""
        return self.model_dump(include={"orientation", "transparency"}, exclude_defaults=True)

    def as_trained(self) -> dict[str, str]:
        """`as_seen`, and how pairs come from there to a tower's size, where that is not the default."""
        return self.as_seen() | self.model_dump(include={"decode", "resampling"}, exclude_defaults=True)

    @property
    def train_in_words(self) -> str:
        """What `train` names, for messages."""
        return ", ".join(f"data.train.{name}" for name in self.train) if isinstance(self.train, dict) else f"data.train = {self.train!r}"

    @field_validator("caption")
    @classmethod
    def _caption_is_text(cls, caption: str) -> str:
        try:
            return check_member(caption)
        except ValueError as error:
            raise ValueError(f"caption = {error}") from None

    @model_validator(mode="after")
    def _one_policy(self) -> Data:
        if self.captions is not None and "caption" in self.model_fields_set:
            raise ValueError(f"caption = {self.caption!r} and captions: both say which captions are read; keep one of them")
        return self

    @model_serializer(mode="wrap")
    def _without_the_other(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As a recipe gives it: with `captions` there is no `caption`."""
        content: dict[str, Any] = plain(self)
        return {key: value for key, value in content.items() if key != "caption" or self.captions is None}

    def caption_shares(self) -> dict[CaptionSource, float]:
        """What is drawn of each source of the captions that are trained on."""
        return shares({self.caption: 1.0} if self.captions is None else self.captions)


class Kernels(Section):
    """How losses over the similarity matrix are computed: speed and memory, not what is learned."""

    backend: Literal["auto", "eager", "compiled", "chunked", "triton"] = Field("auto", description="auto: the fastest as measured")
    ring: bool = Field(False, description="pass texts around the ranks instead of gathering them: for batches that do not fit")


class Checkpoint(Section):
    every: Positive = Field(500, description="steps between checkpoints; the last step is always saved")
    keep: Positive = Field(2, description="newest checkpoints that stay on disk")
    best: str | None = Field(
        None,
        description="a score, such as zero_shot/NAME/top1 or retrieval/NAME/mean_R@1: the weights of the best evaluation so far make "
        "RUN/best, as those at the end RUN/model; each evaluation then comes with a checkpoint",
    )


class Export(Section):
    heads: bool = Field(False, description="keep what the objectives trained beside the towers, in model/heads.safetensors")
    weights: Literal["current", "ema"] = Field(
        "current",
        description="what RUN/model, RUN/bundle and `megakd export` are made of: the last step's weights, or their average (optim.ema)",
    )


class Log(Section):
    every: Positive = Field(10, description="steps between rows of metrics.jsonl")
    profile: NonNegative = Field(
        0,
        description="steps of each start, from its third on, that torch's profiler records on the first rank, into RUN/profile: a trace "
        "for Perfetto, and the operators that take the most time; 0: none",
    )


class Watchdog(Section):
    """A run that hangs ends, with the stacks of its threads, instead of holding its machines."""

    limit: Weight = Field(
        1800.0, le=1e8, description="seconds without progress (a phase of a step, a batch scored) after which a rank ends; 0: never"
    )

    @model_validator(mode="after")
    def _at_least_a_second(self) -> Watchdog:
        if 0 < self.limit < 1:
            raise ValueError(
                f"limit = {self.limit}: a run without progress for so short would always be ended; give seconds, or 0 for never"
            )
        return self


class Sources(Section):
    """What a recipe begins with: its name, the data and the models. A base of `Recipe`, so that its keys come first."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*$",
        max_length=100,
        description="runs/NAME is the run's folder unless --out says another; letters, digits, '.', '_' and '-'",
    )
    seed: int = Field(0, ge=0, lt=2**63 - 1, description="of every draw: initial weights, order of the data, augmentation, dropout")
    data: Data = Data()
    views: Views = Views()
    student: Student | None = Field(None, description="absent: a decoder that learns from text alone, the blind control")
    teacher: Teacher | None = None
    ensemble: dict[Name, Teacher] = Field(default_factory=dict, description="further teachers by name; losses are means over all by weight")


class Scored(Section):
    """What a model without a run is scored on, of a recipe."""

    seed: int = Field(0, ge=0, lt=2**63 - 1, description="of random weights")
    data: Data = Data()
    evaluation: Evaluation = Evaluation()


class Recipe(ScheduledSections, Sources):
    """Everything that is learned, and from what."""

    kernels: Kernels = Kernels()
    decoder: Decoder | None = None
    answers: Answers | None = None
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    export: Export = Export()
    log: Log = Log()
    watchdog: Watchdog = Watchdog()

    def samples_in_a_step(self) -> int:
        """Pairs, or questions where nothing is learned from pairs; over all ranks."""
        return self.optim.batch if self.active() else self.questions_in_a_step()

    def questions_in_a_step(self) -> int:
        """Over all ranks; 0 where nothing is learned from answers."""
        return 0 if self.answers is None else self.answers.batch or self.optim.batch

    def teachers(self) -> dict[str, Teacher]:
        """By role: "teacher", then "ensemble.NAME" in the recipe's order."""
        first = {} if self.teacher is None else {"teacher": self.teacher}
        return first | {f"ensemble.{name}": teacher for name, teacher in self.ensemble.items()}

    def weighted_teachers(self) -> dict[str, Teacher]:
        """Those of `teachers` that have a weight in some step: no other is loaded."""
        return {role: teacher for role, teacher in self.teachers().items() if self.peak(f"{role}.weight") > 0}

    def teacher_weights(self, step: int) -> list[float]:
        """Of `weighted_teachers`, in the step number `step`."""
        return [self.value_at(f"{role}.weight", step) for role in self.weighted_teachers()]

    def first_without(self, roles: Collection[str]) -> int | None:
        """The first step in which the weights of all these teachers are 0; None where one of them has a weight in each step."""
        moves = [schedule for key, schedule in self.schedules.items() if key.removesuffix(".weight") in roles]
        ends = {0, *(end for one in moves for end in (one.from_step, one.to_step or self.optim.steps))}
        steps = sorted(step for step in ends if step < self.optim.steps)
        return next((step for step in steps if not any(self.value_at(f"{role}.weight", step) for role in roles)), None)

    def best_score(self) -> BestScore | None:
        """What `checkpoint.best` goes by; None without it."""
        name = self.checkpoint.best
        return None if name is None else best.read(name, self.evaluation, list(self.weighted_teachers()))

    def teacher_blocks(self) -> dict[int, str]:
        """Blocks of the teachers' vision towers whose patch tokens active objectives read, each with the name of one that does."""
        sections = {name: getattr(self, name, None) for name in self.active()}
        reading = {name: section for name, section in sections.items() if isinstance(section, PatchRelation) and section.reads_tokens}
        return {block: name for name, section in reading.items() for block in section.read_blocks}

    def weighs_teachers_alike(self) -> bool:
        """Whether the losses are plain means over the teachers in every step."""
        roles = self.weighted_teachers()
        return len(roles) < 2 or (len(set(self.teacher_weights(0))) == 1 and not any(f"{role}.weight" in self.schedules for role in roles))

    @model_validator(mode="after")
    def _something_to_learn(self) -> Recipe:
        if self.ensemble and self.teacher is None:
            raise ValueError("[ensemble] holds teachers beside [teacher], and there is no [teacher]: name one of them so")
        if self.ensemble and any(teacher.store not in (None, IN_SHARDS) for teacher in self.teachers().values()):
            raise ValueError("a store replays one teacher's augmentations: teacher.store works without [ensemble] alone")
        if self.teacher is not None and not self.weighted_teachers():
            weights = ", ".join(f"{role}.weight = {teacher.weight:g}" for role, teacher in self.teachers().items())
            raise ValueError(f"{weights}: no teacher has a weight; give one a weight above 0, or take [teacher] out")
        if self.teacher is not None and not self.ensemble and (self.teacher.weight != 1.0 or "teacher.weight" in self.schedules):
            raise ValueError(
                "teacher.weight: weights are normalised over the teachers, and [teacher] is the only one; take it out, and weigh its "
                "losses in [objectives]"
            )
        if self.teacher is not None and (step := self.first_without(self.teachers())) is not None:
            raise ValueError(f"schedules: at step {step} the weight of every teacher is 0; keep one of them above 0 in each step")
        active = self.active()
        if not active and self.answers is None:
            raise ValueError("objectives: every weight is 0 and there are no [answers]: nothing would be learned; give one a weight")
        if active and self.student is None:
            raise ValueError(f"objectives.{next(iter(active))}: there is no [student] to learn it")
        if not active and (self.data.captions is not None or self.data.clean):
            key = "clean" if self.data.captions is None else "captions"
            raise ValueError(f"data.{key}: is for the pairs that objectives learn from, and no objective has a weight; take it out")
        of_pairs = [f"data.{key}" for key in ("decode", "resampling") if key in self.data.as_trained()]
        if self.student is not None and self.student.text_padding != "max_length":
            of_pairs.append("student.text_padding")
        if not active and of_pairs:
            raise ValueError(f"{of_pairs[0]}: is for pairs that objectives learn from, and no objective has a weight; take it out")
        if active and self.data.train is None:
            raise ValueError(f"data.train: missing; objectives.{next(iter(active))} learns from image-text shards")
        if not active and self.views.operations():
            raise ValueError(
                f"views.{self.views.operations()[0]}: no objective learns from pairs, and questions see whole images; take it out"
            )
        if self.export.heads and not self.in_need_of_a_teacher():
            raise ValueError("export.heads = true: no active objective reads a teacher, so no head is trained; take it out")
        return self

    @model_validator(mode="after")
    def _student_starts_from_what_is_there(self) -> Recipe:
        if self.student is not None:
            model, pretrained = (None, None) if self.teacher is None else (self.teacher.model, self.teacher.pretrained)
            start.check_teacher(self.student, model, pretrained, there=self.teacher is not None)
        return self

    @model_validator(mode="after")
    def _scales_are_read(self) -> Recipe:
        matched = {role: teacher for role, teacher in self.weighted_teachers().items() if teacher.scale == MATCHED}
        if matched and not any(declaration(name).compares_rows for name in self.active()):
            reading = ", ".join(name for name in type(self.objectives).model_fields if declaration(name).compares_rows)
            raise ValueError(
                f"{next(iter(matched))}.scale = 'matched': no active objective compares rows of the similarity matrix, whose entropy it "
                f"matches; give one of objectives.{{{reading}}} a weight, or set the scale to a number"
            )
        given = [role for role, teacher in self.weighted_teachers().items() if teacher.scale not in (None, MATCHED)]
        needing = self.in_need_of_a_teacher()
        if given and needing and not any(declaration(name).compares_rows or declaration(name).needs_bias for name in needing):
            raise ValueError(
                f"{given[0]}.scale: objectives.{{{', '.join(needing)}}} read embeddings and patches alone, and no teacher's scale; "
                "take it out"
            )
        for role, teacher in matched.items():
            if teacher.entropy is not None and teacher.entropy >= math.log(self.optim.batch):
                raise ValueError(
                    f"{role}.entropy = {teacher.entropy:g}: a row of optim.batch = {self.optim.batch} pairs has less than "
                    f"log {self.optim.batch} = {math.log(self.optim.batch):.4g} nats; lower it"
                )
        return self

    @model_validator(mode="after")
    def _shards_hold_what_is_read(self) -> Recipe:
        reading = {role: teacher for role, teacher in self.teachers().items() if teacher.store == IN_SHARDS}
        if not reading:
            return self
        role, first = next(iter(reading.items()))
        given = f"{role}.store = {IN_SHARDS!r}"
        for other, teacher in self.teachers().items():
            if teacher.store != first.store or teacher.store_of != first.store_of:
                raise ValueError(
                    f"{other}.store = {teacher.store!r}, {other}.store_of = {teacher.store_of!r} beside {given}, {role}.store_of = "
                    f"{first.store_of!r}: all teachers read the shards alike, or none does; each has its part of a row"
                )
            if teacher.scale is None and any(declaration(name).compares_rows for name in self.in_need_of_a_teacher()):
                raise ValueError(
                    f"{other}.scale: missing; with store = {IN_SHARDS!r} no weights are read, and the shards hold no logit scale. "
                    "MobileCLIP takes 100 for DataCompDR's two teachers, MobileCLIP2 70 and 60 for DFNDR's"
                )
        if biased := [name for name in self.in_need_of_a_teacher() if declaration(name).needs_bias]:
            raise ValueError(f"objectives.{biased[0]}: needs the teacher's logit bias, which shards do not hold; take {role}.store out")
        if self.data.clean:
            raise ValueError(f"data.clean = {list(self.data.clean)}: the shards hold embeddings of the captions as they are; take it out")
        if first.store_of == "all" and (made := [key for key in ("decode", "resampling") if key in self.data.as_trained()]):
            raise ValueError(
                f"data.{made[0]} = {getattr(self.data, made[0])!r}: with {given} the very pixels are replayed that the shards' generator "
                "saw, of images decoded in full and resized by Pillow; take it out"
            )
        if first.store_of == "all" and self.views.policy() != Views().policy():
            changed = [key for key, value in self.views.policy().items() if value != Views().policy().get(key)]
            raise ValueError(f"views.{changed[0]}: with {given} the shards' own augmentations are replayed; take it out (views.seed stays)")
        return self

    @model_validator(mode="after")
    def _answers_have_a_decoder(self) -> Recipe:
        if (self.answers is None) != (self.decoder is None):
            there, missing = ("[answers]", "[decoder]") if self.decoder is None else ("[decoder]", "[answers]")
            raise ValueError(f"{there} without {missing}: a decoder is what answers, and answers are what it learns; give both or neither")
        if self.evaluation.vqa and self.decoder is None:
            raise ValueError("evaluation.vqa: there is no [decoder] to answer")
        if self.answers is not None and self.answers.tower == "trained" and self.student is None:
            raise ValueError("answers.tower = 'trained': there is no [student], and so no tower")
        clip_sets = [kind for kind in ("zero_shot", "retrieval", "hard_negatives", "diagnostics") if getattr(self.evaluation, kind)]
        if clip_sets and not self.active():
            raise ValueError(f"evaluation.{clip_sets[0]}: without an objective the student's text tower is not trained: take the set out")
        at_end = [kind for kind in ("reader", "probe") if getattr(self.evaluation, kind)]
        if at_end and not self.active():
            raise ValueError(
                f"evaluation.{at_end[0]}: it scores students that learn from pairs, and no objective has a weight: take it out; "
                "`megakd evaluate --model` scores a tower without a run"
            )
        return self

    @model_validator(mode="after")
    def _parts_can_learn(self) -> Recipe:
        learns.check_profile(self.log.profile, self.optim.steps)
        learns.check_parts(self.optim, self.student, self.answers, pairs=bool(self.active()))
        learns.check_ema(self.optim, self.evaluation, self.export.weights)
        self.best_score()
        return self

    @model_validator(mode="after")
    def _answers_move_something(self) -> Recipe:
        if self.answers is None or self.decoder is None:
            return self
        sees, rates, adapt = self.student is not None, self.answers.lr, self.decoder.adapt
        if not sees and adapt == "none":
            raise ValueError("decoder.adapt = 'none' without [student]: no projector and no weights to train; set it to 'lora' or 'full'")
        if not sees and self.decoder.image_fit != "tower":
            raise ValueError(f"decoder.image_fit = {self.decoder.image_fit!r}: without [student] the decoder sees no picture; take it out")
        if rates.decoder is not None and adapt == "none":
            raise ValueError("answers.lr.decoder: decoder.adapt = 'none' trains nothing of the language model; take the rate out")
        if rates.projector is not None and not sees:
            raise ValueError("answers.lr.projector: without [student] the decoder has no projector; take the rate out")
        if rates.tower is not None and not (sees and (self.answers.tower == "trained" or self.active())):
            raise ValueError("answers.lr.tower: nothing trains the vision tower: take the rate out, or set answers.tower to 'trained'")
        return self
