"""The models of a recipe: the student, its teachers, and how their images are prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from megakd.recipe import start
from megakd.recipe.parts import HEADS, IMAGE, TEXT, Part
from megakd.recipe.placements import INT8, INT8_MODES, MODES, PLACEMENTS
from megakd.recipe.section import (
    MATCHED,
    FloatTriple,
    Fraction,
    GridSize,
    ImageSize,
    Int8Product,
    NonNegative,
    PositiveFloat,
    Scale,
    ScheduledWeight,
    Section,
    TeacherMode,
    Weight,
)

IN_SHARDS = "data.train"  # of teacher.store


class Preprocess(Section):
    """How images were prepared for a model's weights; what is left out is the tag's, the folder's or open_clip's default."""

    mean: FloatTriple | None = Field(None, description="of each colour, subtracted; pixels are 0 to 1")
    std: FloatTriple | None = Field(None, description="of each colour, divided by")
    interpolation: Literal["bicubic", "bilinear"] | None = Field(None, description="of the resizing")
    resize_mode: Literal["shortest", "longest", "squash"] | None = Field(None, description="what is brought to the tower's size")


class Model(Section):
    """A CLIP-style pair of towers: `model` names one (open_clip, `hf-hub:`, `local-dir:`), `architecture` describes one.

    A teacher may also be a timm model (`timm:`) or a vision tower of transformers (`transformers:`), which see images alone.
    """

    model: str | None = Field(
        None, description="open_clip name, hf-hub:ORG/NAME, local-dir:FOLDER; a teacher of images alone: timm:NAME, transformers:FOLDER"
    )
    architecture: dict[str, Any] | None = Field(None, description="an open_clip model configuration: embed_dim, vision_cfg, text_cfg")
    pretrained: str | None = Field(None, description="open_clip's pretrained tag (timm's for timm:NAME), or a .safetensors/.pt file")
    tokenizer: str | None = Field(None, description="folder of a Hugging Face tokenizer; default: the model's own")
    preprocess: Preprocess | str | None = Field(
        None,
        description="images for weights of a file: a table, or the tag they are (TAG, MODEL:TAG); default: what all tags share",
    )
    image_size: ImageSize | None = Field(
        None,
        description="pixels a side, or [height, width], of the images that a named model sees; its positions are interpolated as "
        "open_clip, timm or transformers do; default: its own. An architecture has it in vision_cfg",
    )
    text_padding: Literal["max_length", "longest"] = Field(
        "max_length",
        description="what training and stores pad texts to: max_length: the tower's context length; longest: the batch's longest text, in "
        "steps of 8 tokens; a causal tower that pools at a text's end gives the same embeddings up to rounding, in less time",
    )
    recipe: str | None = Field(None, description="recipe that trains this model first when the folder of `model` is not there yet")

    _text_of: Model | None = PrivateAttr(None)

    @property
    def text_of(self) -> Model | None:
        """The model whose text tower and tokenizer this one has; None: its own. `chain.with_text` sets it, by `student.text_from`."""
        return self._text_of

    @property
    def speaks_as(self) -> Model:
        """The model whose tokenizer this one has."""
        return self if self._text_of is None else self._text_of.speaks_as

    def having_text_of(self, other: Model | None) -> Self:
        copy = self.model_copy()
        copy._text_of = other
        return copy

    @model_validator(mode="after")
    def _describes_one_model(self) -> Model:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give either `model` (a name) or `architecture` (a table), not both and not neither")
        if self.image_size is not None and self.architecture is not None:
            raise ValueError(
                f"image_size = {list(self.image_size)} is for named models; write it as architecture.vision_cfg.image_size, not here"
            )
        if isinstance(self.preprocess, Preprocess) and self.preprocess.std is not None and min(self.preprocess.std) <= 0:
            raise ValueError(f"preprocess.std = {list(self.preprocess.std)}: pixels are divided by it; give numbers above 0")
        if self.recipe is not None and not (self.model or "").startswith("local-dir:"):
            raise ValueError(
                f"recipe = {self.recipe!r} trains into a run folder: model must be 'local-dir:RUN/model' of that run, not {self.model!r}"
            )
        return self


class Student(Model, start.Start):
    activation_checkpointing: bool = Field(False, description="recompute the blocks in the backward: less memory, about a third more time")
    compile: bool = Field(
        False,
        description="torch.compile of the towers' blocks, at each start anew: rounding alone changes; where no compiler is, the run says "
        "so and is a plain one",
    )
    max_scale: PositiveFloat = Field(100.0, description="upper bound of the learned logit scale")
    freeze: list[str] = Field(
        default_factory=list,
        description="parts that are not trained: image, text, image.embeddings, image.blocks, image.blocks.0-5, image.head, text likewise, "
        "scale; they keep their first weights, without dropout, and cost no gradient and no optimiser",
    )

    @field_validator("freeze")
    @classmethod
    def _freezes_parts(cls, names: list[str]) -> list[str]:
        for part in (Part.read(repr(name), name) for name in names):
            if part.tower == HEADS:
                raise ValueError(f"{part.name!r}: heads have no weights of their own to keep; take it out")
        if {IMAGE, TEXT} <= set(names):
            raise ValueError("nothing of the student would learn; take one of its towers out")
        return names

    @model_validator(mode="after")
    def _a_tower_has_one_start(self) -> Student:
        start.check(self, self.model, self.pretrained, self.tokenizer, self.recipe)
        return self


class Teacher(Model):
    scale: Scale = Field(
        None,
        description="logit scale that objectives see in place of the teacher's own: a number (MobileCLIP2 takes 70 and 60), or matched: "
        "the one at which its rows have a given entropy",
    )
    entropy: PositiveFloat | None = Field(
        None, description="matched: mean entropy in nats of a batch's rows, image to texts; default: the student's at its current scale"
    )
    weight: ScheduledWeight = Field(
        1.0, description="of this teacher's losses beside other teachers', normalised to sum 1; 0: left out, and not loaded"
    )
    mode: TeacherMode = Field(
        "replicated",
        description="; ".join(f"{name}: {placement.summary}" for name, placement in PLACEMENTS.items())
        + "; _int8: in 8 bit (else bf16, on a CPU fp32)",
    )
    outlier_threshold: Weight = Field(0.0, description="int8: activations above it are multiplied in 16 bit; 0 multiplies all in 8 bit")
    int8_product: Int8Product = Field(
        "auto",
        description="how int8 weights are multiplied; auto: the fastest way of the device that keeps their 8 bits; onednn: 64 "
        "levels, for x86 CPUs without VNNI, where it alone is faster than float32",
    )
    calibration: NonNegative = Field(
        0, description="int8: pairs of the training set that show which activations are outliers, which move into the weights; 0: none do"
    )
    int8_agreement: Fraction = Field(
        0.98, description="int8: least centred cosine to the teacher in 16 bit, of a batch compared at start; 0 compares nothing"
    )
    compile: bool = Field(
        False, description="replicated: torch.compile of its towers' blocks, as student.compile; its rows in a store change by rounding"
    )
    offload: bool = Field(False, description="zero3: keep this rank's part in CPU memory between uses")
    ds_config: str | None = Field(None, description="zero3: the teacher's DeepSpeed JSON; default: as ds_configs/teacher_zero3.json")
    patch_grid: GridSize | None = Field(
        None,
        description="rows and columns that its patch tokens and its attention are averaged to, by area; default: the tower's own; a store "
        "has patch tokens with it alone",
    )
    store: str | None = Field(
        None,
        description="folder of embeddings that `megakd embed` wrote: read instead of running the teacher; data.train: its shards hold them "
        "with their augmentations, as DataCompDR's and DFNDR's do",
    )
    store_of: Literal["all", "text"] = Field(
        "all", description="text: only texts come from the store; images are freshly augmented and the text tower is not loaded"
    )
    store_miss: Literal["teacher", "fail"] = Field("teacher", description="what the store lacks: ask the live teacher, or end the run")

    @property
    def placement(self) -> str:
        """Where the weights lie: a name of `recipe/placements.py`."""
        return self.mode.removesuffix(INT8)

    @property
    def int8(self) -> bool:
        """Whether attention and MLP weights are in 8 bit."""
        return self.mode.endswith(INT8)

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Teacher:
        def is_set(key: str) -> bool:
            return getattr(self, key) != type(self).model_fields[key].default  # type: ignore[no-any-return]

        for name, placement in PLACEMENTS.items():
            for key in filter(is_set, placement.options):
                if key not in PLACEMENTS[self.placement].options:
                    modes = " or ".join(mode for mode in MODES if mode.removesuffix(INT8) == name)
                    raise ValueError(f"{key} is for a teacher {placement.summary}: set mode to {modes}, it is {self.mode!r}")
        for key in () if self.int8 else filter(is_set, ("outlier_threshold", "calibration", "int8_product", "int8_agreement")):
            raise ValueError(
                f"{key} is for int8 weights, and mode is {self.mode!r}: set mode to {INT8_MODES}, or {key} to "
                f"{type(self).model_fields[key].default}"
            )
        if self.entropy is not None and self.scale != MATCHED:
            raise ValueError(f"entropy = {self.entropy:g} is what a matched scale aims at: set scale to 'matched', or take entropy out")
        if self.int8_product == "dequantise" and self.outlier_threshold:
            raise ValueError(
                "int8_product = 'dequantise' multiplies all activations in 16 bit: set outlier_threshold to 0, or int8_product to int_mm"
            )
        if self.compile and self.int8_product == "onednn":
            raise ValueError(
                "compile = true: torch compiles no product of int8_product = 'onednn', which packs its weights anew each time; take "
                "compile out, or set int8_product to auto"
            )
        if self.compile and self.store is not None and self.store_of == "all":
            raise ValueError(
                f"compile = true: with store = {self.store!r} the teacher runs only for what the store lacks; take compile out, or set "
                "store_of to 'text' so that its images are computed"
            )
        if self.store == IN_SHARDS:
            self._reads_shards(is_set)
        elif self.store_of == "text" and (self.store is None or self.store_miss != "fail"):
            raise ValueError(
                "store_of = 'text' drops the text tower: it needs a store, and store_miss = 'fail', as there is nothing to ask"
            )
        return self

    def _reads_shards(self, is_set: Callable[[str], bool]) -> None:
        """Raises ValueError for what the shards of data.train cannot give."""
        if is_set("store_miss"):
            raise ValueError(
                f"store_miss = {self.store_miss!r}: with store = {IN_SHARDS!r} a sample without embeddings is an unusable one, counted and "
                "replaced; take it out"
            )
        if is_set("patch_grid"):
            raise ValueError(
                f"patch_grid = {list(self.patch_grid or ())}: with store = {IN_SHARDS!r} there are embeddings alone, and no patch tokens; "
                "take one of the two out"
            )
        if is_set("text_padding"):
            raise ValueError(
                f"text_padding = {self.text_padding!r}: with store = {IN_SHARDS!r} the teacher's text tower reads nothing; take it out"
            )
