"""`[views]`: the augmentation of the pairs, and the values that published recipes give it.

Operations follow the crop and the flip in the order of their keys. Every value is drawn from the seed and the sample's place, see
`data/augmentation.py`; names are those of torchvision and timm.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megakd.recipe.section import FloatPair, Fraction, Section

MOST_MAGNITUDE = 30  # torchvision's RandAugment has 31 magnitudes
Channel = Annotated[int, Field(ge=0, le=255)]
Color = Annotated[tuple[Channel, Channel, Channel], Field(strict=False)]


def _is_noise_or_a_color(value: Any) -> Any:
    """One message for a value that is neither of the two."""
    if value != "noise" and not (
        isinstance(value, list | tuple) and len(value) == 3 and all(type(part) is int and 0 <= part <= 255 for part in value)
    ):
        raise ValueError("'noise', or a colour: [red, green, blue], each from 0 to 255")
    return value


ErasedWith = Annotated[Literal["noise"] | Color, BeforeValidator(_is_noise_or_a_color)]
Strength = Annotated[float, Field(ge=0.0, le=1.0)]
Preset = Literal["clip", "mobileclip", "timm"]


class RandAugment(Section):
    """torchvision's RandAugment: `layers` operations, each drawn from its fourteen."""

    magnitude: float = Field(
        ge=0,
        le=MOST_MAGNITUDE,
        description="0 to 30 as torchvision counts; timm counts to 10: its m9 is 27, with inc1, and mstd 0.5 is 1.5",
    )
    layers: int = Field(2, ge=1, le=10, description="operations an image, one after another; one may be drawn twice")
    std: float = Field(0.0, ge=0, le=MOST_MAGNITUDE, description="of a normal draw around magnitude, cut at 0 and 30; 0: always magnitude")
    probability: Fraction = Field(1.0, description="of each layer")
    interpolation: Literal["nearest", "bilinear", "bicubic"] = Field("nearest", description="of shears, shifts and rotations")
    fill: Color = Field((0, 0, 0), description="colour of what shears, shifts and rotations leave empty, red, green, blue of 255")


class ColorJitter(Section):
    """torchvision's ColorJitter: factors drawn evenly, in an order that is drawn."""

    brightness: Strength = Field(0.0, description="x: a factor from 1 - x to 1 + x")
    contrast: Strength = Field(0.0, description="as brightness")
    saturation: Strength = Field(0.0, description="as brightness")
    hue: float = Field(0.0, ge=0, le=0.5, description="x: a turn from -x to x, of the whole circle")
    probability: Fraction = Field(1.0, description="of jittering an image at all")

    @model_validator(mode="after")
    def _changes_something(self) -> ColorJitter:
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            raise ValueError("brightness, contrast, saturation and hue are all 0, which changes nothing; give one, or take the table out")
        return self


class Blur(Section):
    """torchvision's GaussianBlur."""

    probability: Fraction = Field(description="of blurring an image")
    sigma: FloatPair = Field(
        (0.1, 2.0), description="in pixels of an image of 224 rows, drawn evenly between the two; scaled to a tower's size"
    )

    @field_validator("sigma")
    @classmethod
    def _range(cls, sigma: tuple[float, float]) -> tuple[float, float]:
        if not 0 < sigma[0] <= sigma[1] <= 20:
            raise ValueError(f"sigma = {list(sigma)}: give two numbers above 0 and up to 20, the smaller first")
        return sigma


class Erase(Section):
    """torchvision's RandomErasing, of the bytes of the pixels, before mean and std."""

    probability: Fraction = Field(description="of erasing a rectangle of an image")
    scale: FloatPair = Field((0.02, 0.33), description="area of the rectangle as a fraction of the picture")
    ratio: FloatPair = Field((0.3, 3.3), description="height / width of the rectangle")
    value: ErasedWith = Field((0, 0, 0), description="its colour, red, green, blue of 255; noise: each byte drawn evenly")

    @model_validator(mode="after")
    def _ranges(self) -> Erase:
        low, high = self.scale
        if not 0 < low <= high < 1:
            raise ValueError(f"scale = [{low}, {high}]: give two fractions of the area with 0 < low <= high < 1; 1 would leave no picture")
        if not 0.01 <= self.ratio[0] <= self.ratio[1] <= 100:
            raise ValueError(f"ratio = {list(self.ratio)}: give two ratios between 0.01 and 100, the smaller first")
        return self


# What the published recipes say; a test compares with the installed open_clip, torchvision and timm.
_WHOLE_RANGE = {"crop_scale": [0.08, 1.0], "crop_ratio": [3 / 4, 4 / 3]}  # torchvision's and timm's defaults, Inception's of old
PRESETS: dict[Preset, dict[str, Any]] = {
    # open_clip 3.3, transform.py: AugmentationCfg.scale and RandomResizedCrop's own ratio, nothing else. (CLIP's paper, arXiv 2103.00020,
    # section 2.4, has a random square crop of the resized image.)
    "clip": {"crop_scale": [0.9, 1.0], "crop_ratio": [3 / 4, 4 / 3], "flip": 0.0},
    # ml-mobileclip, training/configs/datacompdr12m.json and datacompdr1b.json: RandomResizedCrop and RandAugment of torchvision's defaults,
    # with probability 1 (training/dr/transforms.py), no flip.
    "mobileclip": {**_WHOLE_RANGE, "flip": 0.0, "rand_augment": {"layers": 2, "magnitude": 9}},
    # timm's --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel --train-interpolation bicubic, the defaults of DeiT's main.py. Its
    # --color-jitter 0.4 does nothing there, as timm leaves jitter out beside RandAugment (transforms_factory.py). Of timm's fifteen
    # operations torchvision's RandAugment lacks Invert and SolarizeAdd, and has Identity; Posterize keeps 8 to 4 bits, and 4 to 0 in
    # timm; the noise is normal in timm, after mean and std.
    "timm": {
        **_WHOLE_RANGE,
        "flip": 0.5,
        "rand_augment": {
            **{"layers": 2, "magnitude": 27.0, "std": 1.5, "probability": 0.5},
            **{"interpolation": "bicubic", "fill": [124, 116, 104]},  # ImageNet's mean colour
        },
        "erase": {"probability": 0.25, "scale": [0.02, 1 / 3], "ratio": [0.3, 1 / 0.3], "value": "noise"},
    },
}
Operation = TypeVar("Operation", RandAugment, ColorJitter, Blur, Erase)


class Views(Section):
    """The augmentation, drawn once a sample and applied to every tower's view of it: crop, flip, then the operations as they stand here."""

    preset: Preset | None = Field(
        None, description="values of a published recipe, for the keys that are not given beside it; run.json holds the values alone"
    )
    crop_scale: FloatPair = Field((0.5, 1.0), description="area of the crop as a fraction of the image")
    crop_ratio: FloatPair = Field((0.75, 4 / 3), description="width / height of the crop")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    rand_augment: RandAugment | None = None
    color_jitter: ColorJitter | None = None
    grayscale: Fraction | None = Field(None, description="probability of an image without colour")
    blur: Blur | None = None
    erase: Erase | None = None
    seed: int | None = Field(
        None, ge=0, lt=2**63 - 1, description="of the augmentation alone; default: the run's. Runs of unlike seeds share a store by it"
    )

    def seed_in(self, run_seed: int) -> int:
        """Of the augmentation in a run of that seed."""
        return run_seed if self.seed is None else self.seed

    def operations(self) -> list[str]:
        """Keys of what follows the crop and the flip, in this order; empty for the plain augmentation."""
        return [key for key in ("rand_augment", "color_jitter", "grayscale", "blur", "erase") if getattr(self, key) is not None]

    def policy(self) -> dict[str, Any]:
        """What pixels depend on, as plain values: without the seed, and without operations that are not asked for.

        So a store made before an operation was known is one without it.
        """
        return self.model_dump(mode="json", exclude={"seed", "preset"}, exclude_none=True)

    def __str__(self) -> str:
        """For people: every value."""
        values = self.policy()
        tables = {key: value for key, value in values.items() if isinstance(value, dict)}
        plain = ", ".join(f"{key} {value}" for key, value in values.items() if key not in tables)
        return "; ".join(
            [plain, *(f"{key}: " + ", ".join(f"{name} {value}" for name, value in one.items()) for key, one in tables.items())]
        )

    @model_validator(mode="before")
    @classmethod
    def _with_the_presets_values(cls, given: Any) -> Any:
        """The preset's values in the place of its name: what is written down and compared are values."""
        preset = given.get("preset") if isinstance(given, dict) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return given
        own = {key: value for key, value in given.items() if key != "preset"}
        if own.keys() >= cls.model_fields.keys() - {"preset", "seed"}:
            raise ValueError(
                f"preset = {preset!r} would change nothing, as every key is given beside it: leave out those that it is to set (a run.json "
                "gives all of them)"
            )
        filled = {**PRESETS[preset], **own}
        for key, value in PRESETS[preset].items():
            if isinstance(value, dict) and isinstance(own.get(key), dict):
                filled[key] = {**value, **own[key]}
        return filled

    @field_validator("rand_augment", "color_jitter", "blur", "erase")
    @classmethod
    def _never_is_none(cls, operation: Operation | None) -> Operation | None:
        """An operation with probability 0 is none: so a preset's is taken out, and a store of one is a store of the other."""
        return None if operation is None or operation.probability == 0 else operation

    @field_validator("grayscale")
    @classmethod
    def _never_grey_is_none(cls, probability: float | None) -> float | None:
        return probability or None

    @model_validator(mode="after")
    def _ranges(self) -> Views:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale = [{low}, {high}]: give two fractions of the area with 0 < low <= high <= 1")
        if not 0.01 <= self.crop_ratio[0] <= self.crop_ratio[1] <= 100:
            raise ValueError(f"crop_ratio = {list(self.crop_ratio)}: give two ratios between 0.01 and 100, the smaller first")
        return self
