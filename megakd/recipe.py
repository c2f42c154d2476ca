"""A recipe says what is learned: data, models, objectives, optimisation. One frozen, typed tree; no other module has defaults.

How a run is carried out (ZeRO stage, precision, micro-batch, monitors) is the DeepSpeed JSON's to say; see `runtime/engine.py`.
Reading, overriding and comparing recipes is in `recipe_files.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
HeadKind = Literal["linear", "mlp"]
TeacherMode = Literal["replicated", "replicated_int8", "zero3", "zero3_int8"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# A list in TOML becomes a fixed-length tuple; strict mode alone would refuse the list.
FloatPair = Annotated[tuple[float, float], Field(strict=False)]


class Section(BaseModel):
    """Unknown keys are errors and values keep their type: a recipe never means something else than it says."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Data(Section):
    """Image-text shards: tars of `.jpg` and `.txt` members, as img2dataset writes them."""

    train: str | list[str] = Field(min_length=1, description="paths or URLs; braces expand, '::' joins")
    caption: str = Field("txt", description="extension of the caption's member in the tar")
    workers: NonNegative = Field(2, description="decoding processes of each rank; 0 decodes in the trainer's own")
    block: Positive = Field(64, description="consecutive samples that the shuffle keeps together until the last stage")
    window: Positive = Field(256, description="blocks that are mixed with each other; block * window samples are shuffled as one")
    max_bad_fraction: Fraction = Field(0.01, description="the run fails when more of the samples seen are unreadable")
    max_pixels: Positive = Field(50_000_000, description="a larger image is refused before it is decoded")
    cache: str | None = Field(None, description="folder for the shards' indexes and for local copies of remote shards")


class Views(Section):
    """The augmentation, drawn once a sample and applied to every tower's view of it."""

    crop_scale: FloatPair = Field((0.5, 1.0), description="area of the crop as a fraction of the image")
    crop_ratio: FloatPair = Field((0.75, 4 / 3), description="width / height of the crop")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")

    @model_validator(mode="after")
    def _ranges(self) -> Views:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale = [{low}, {high}]: give two fractions of the area with 0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio = {list(self.crop_ratio)}: give two positive ratios, the smaller first")
        return self


class Model(Section):
    """A CLIP-style pair of towers: `model` names one (open_clip, `hf-hub:`, `local-dir:`), `architecture` describes one."""

    model: str | None = Field(None, description="open_clip name, hf-hub:ORG/NAME or local-dir:FOLDER")
    architecture: dict[str, Any] | None = Field(None, description="an open_clip model configuration: embed_dim, vision_cfg, text_cfg")
    pretrained: str | None = Field(None, description="open_clip's pretrained tag, or a .safetensors/.pt file")
    tokenizer: str | None = Field(None, description="folder of a Hugging Face tokenizer; default: the model's own")

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give either `model` (a name) or `architecture` (a table), not both and not neither")
        return self


class Student(Model):
    activation_checkpointing: bool = Field(False, description="recompute the blocks in the backward: less memory, about a third more time")
    max_scale: PositiveFloat = Field(100.0, description="upper bound of the learned logit scale")


class Teacher(Model):
    mode: TeacherMode = Field(
        "replicated",
        description="replicated: whole on every rank; zero3: partitioned over the ranks; _int8: in 8 bit (else bf16, on a CPU fp32)",
    )
    outlier_threshold: Weight = Field(0.0, description="int8: activations above it are multiplied in 16 bit; 0 multiplies all in 8 bit")
    offload: bool = Field(False, description="zero3: keep this rank's part in CPU memory between uses")
    ds_config: str | None = Field(None, description="zero3: the teacher's DeepSpeed JSON; default: as ds_configs/teacher_zero3.json")
    store: str | None = Field(None, description="folder of embeddings that `megakd embed` wrote: read instead of running the teacher")
    store_of: Literal["all", "text"] = Field(
        "all", description="text: only texts come from the store; images are freshly augmented and the text tower is not loaded"
    )
    store_miss: Literal["teacher", "fail"] = Field("teacher", description="what the store lacks: ask the live teacher, or end the run")
    recipe: str | None = Field(None, description="recipe that trains this teacher first when the folder of `model` is not there yet")

    @model_validator(mode="after")
    def _recipe_has_a_place(self) -> Teacher:
        if self.recipe is not None and not (self.model or "").startswith("local-dir:"):
            raise ValueError(
                f"recipe = {self.recipe!r} trains into a run folder: model must be 'local-dir:RUN/model' of that run, not {self.model!r}"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Teacher:
        if not self.mode.startswith("zero3") and (self.offload or self.ds_config is not None):
            raise ValueError(f"offload and ds_config are for a partitioned teacher: set mode to zero3 or zero3_int8, it is {self.mode!r}")
        if not self.mode.endswith("int8") and self.outlier_threshold:
            raise ValueError(f"outlier_threshold is for int8 weights: set mode to replicated_int8 or zero3_int8, it is {self.mode!r}")
        if self.store_of == "text" and (self.store is None or self.store_miss != "fail"):
            raise ValueError(
                "store_of = 'text' drops the text tower: it needs a store, and store_miss = 'fail', as there is nothing to ask"
            )
        return self


class Objectives(Section):
    """name = weight; 0 leaves an objective out."""

    contrastive: Weight = 0.0
    similarity: Weight = 0.0
    sigmoid_contrastive: Weight = 0.0
    sigmoid_similarity: Weight = 0.0
    interactive: Weight = 0.0
    feature: Weight = 0.0

    def active(self) -> dict[str, float]:
        return {name: weight for name, weight in self if weight > 0}

    @model_validator(mode="after")
    def _at_least_one(self) -> Objectives:
        if not self.active():
            raise ValueError("every weight is 0: nothing would be learned; give at least one objective a positive weight")
        return self


class Similarity(Section):
    """Similarity-matrix KD: KL divergence of the two towers' softmaxes over rows and columns."""

    temperature: PositiveFloat = Field(1.0, description="divides both towers' logits")
    student_scale: PositiveFloat | None = Field(None, description="fixed logit scale; default: the learned one")


class Interactive(Section):
    """Interactive contrastive learning: projected student embeddings as queries among the teacher's of the other modality."""

    head: HeadKind = "linear"


class Feature(Section):
    """Feature KD: squared distance of the projected student embedding to the teacher's, both normalised."""

    head: HeadKind = "linear"


class Kernels(Section):
    """How losses over the similarity matrix are computed: speed and memory, not what is learned."""

    backend: Literal["auto", "eager", "compiled", "chunked", "triton"] = Field("auto", description="auto: the fastest as measured")
    ring: bool = Field(False, description="pass texts around the ranks instead of gathering them: for batches that do not fit")


class Optim(Section):
    steps: Positive
    batch: Positive = Field(description="global batch: pairs in one optimiser step, over all ranks")
    lr: PositiveFloat
    warmup: NonNegative = Field(0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr: Fraction = Field(0.0, description="learning rate at the end of the cosine, as a fraction of lr")
    betas: FloatPair = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    weight_decay: Weight = Field(0.2, description="on matrices alone: norms, biases, embeddings' scales have none")
    clip: Weight = Field(1.0, description="largest global gradient norm; 0 does not clip")

    @model_validator(mode="after")
    def _warmup_fits(self) -> Optim:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup} does not end before steps = {self.steps}: lower warmup or raise steps")
        return self


class Evaluation(Section):
    """Named evaluation sets. A zero-shot set is a folder as CLIP_benchmark lays it out; the others are shard patterns."""

    every: NonNegative = Field(0, description="steps between evaluations; 0 evaluates at the end alone")
    batch: Positive = 256
    zero_shot: dict[str, str] = Field(default_factory=dict)
    retrieval: dict[str, str] = Field(default_factory=dict)
    hard_negatives: dict[str, str] = Field(default_factory=dict)


class Checkpoint(Section):
    every: Positive = Field(500, description="steps between checkpoints; the last step is always saved")
    keep: Positive = Field(2, description="newest checkpoints that stay on disk")


class Log(Section):
    every: Positive = Field(10, description="steps between rows of metrics.jsonl")


class Watchdog(Section):
    """A run that hangs ends, with the stacks of its threads, instead of holding its machines."""

    limit: Weight = Field(
        1800.0, description="seconds without progress (a phase of a step, a batch scored) after which a rank ends; 0: never"
    )


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    seed: NonNegative = 0
    data: Data
    views: Views = Views()
    student: Student
    teacher: Teacher | None = None
    ensemble: dict[Name, Teacher] = Field(default_factory=dict, description="further teachers by name; the losses of all are averaged")
    objectives: Objectives
    similarity: Similarity = Similarity()
    interactive: Interactive = Interactive()
    feature: Feature = Feature()
    kernels: Kernels = Kernels()
    optim: Optim
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    watchdog: Watchdog = Watchdog()

    def teachers(self) -> dict[str, Teacher]:
        """By role: "teacher", then "ensemble.NAME" in the recipe's order."""
        first = {} if self.teacher is None else {"teacher": self.teacher}
        return first | {f"ensemble.{name}": teacher for name, teacher in self.ensemble.items()}

    @model_validator(mode="after")
    def _ensemble_has_a_first(self) -> Recipe:
        if self.ensemble and self.teacher is None:
            raise ValueError("[ensemble] holds teachers beside [teacher], and there is no [teacher]: name one of them so")
        if self.ensemble and any(teacher.store is not None for teacher in self.teachers().values()):
            raise ValueError("a store replays one teacher's augmentations: teacher.store works without [ensemble] alone")
        return self
