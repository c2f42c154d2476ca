"""What a training image goes through: crop, flip, RandAugment, colour jitter, grey, blur, an erased rectangle, in this order.

One augmentation is drawn for a sample, of numbers that are a function of (seed, position), or of (seed, sample, view) where a store has to
hold it; torchvision's own random state is never asked. Each tower resizes the crop to its input, which the operations then change, as in
published pipelines: so a teacher sees the same pixels whatever student is beside it, in a run and in a store. Lengths are fractions of the
picture, so that towers of unlike sizes get the same. Operations are torchvision's functions on 8-bit pixels; mean and std come afterwards.

Legend: H x W a tower's input size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from megakd.data.sampler import uniform
from megakd.recipe import Views
from megakd.recipe.views import MOST_MAGNITUDE, Blur, ColorJitter, Erase, RandAugment

Box = tuple[float, float, float, float]
Color = tuple[int, int, int]

_ATTEMPTS = 10  # torchvision's, to find a rectangle
# Numbers of a sample's stream. Each operation has its own, so that one more changes nothing of the others.
_OF_CROP = 1 + 4 * _ATTEMPTS
_JITTERED = _OF_CROP
_GREY = _JITTERED + 9
_BLURRED = _GREY + 1
_ERASED = _BLURRED + 2
_LAYERS = _ERASED + 4 + 2 * _ATTEMPTS
_OF_A_LAYER = 4
_SIGMA_ROWS = 224  # sigma is given for pictures of so many


@dataclass(frozen=True)
class Operation:
    """A change of colours or shape. name: in OPERATIONS. strength: as torchvision takes it; of shifts and sigma, parts of the picture."""

    name: str
    strength: float = 0.0


@dataclass(frozen=True)
class Erasure:
    """A rectangle of height * H by width * W, at the fractions top and left of the places where it fits.

    value: its colour, or the key of the noise in it.
    """

    height: float
    width: float
    top: float
    left: float
    value: Color | int


@dataclass(frozen=True)
class Augmentation:
    """A crop (left, top, right, bottom), mirrored after it if `flip`; then the operations, and the erasure.

    box: in pixels of the stored image, whole ones as drawn; of one that was decoded smaller, fractions too.
    interpolation, fill: of operations that move pixels, and the colour of what they leave empty.
    """

    box: Box
    flip: bool
    operations: tuple[Operation, ...] = ()
    erasure: Erasure | None = None
    interpolation: InterpolationMode = InterpolationMode.NEAREST
    fill: Color = (0, 0, 0)

    @property
    def crops_alone(self) -> bool:
        return not self.operations and self.erasure is None


def draw(views: Views, seed: int, position: int, width: int, height: int) -> Augmentation:
    """The augmentation of the sample at `position` of the order: a pure function, as resuming needs it."""
    return _augmentation(views, uniform(seed, "view", (position, 0), _numbers(views)), width, height)


def draw_stored(views: Views, seed: int, index: int, view: int, width: int, height: int) -> Augmentation:
    """Augmentation `view` (from 0) of the sample `index`, whatever its position: one that a store can hold."""
    return _augmentation(views, uniform(seed, "view", (index, 1 + view), _numbers(views)), width, height)


def _numbers(views: Views) -> int:
    if not views.operations():
        return _OF_CROP
    return _LAYERS + (0 if views.rand_augment is None else _OF_A_LAYER * views.rand_augment.layers)


def _augmentation(views: Views, numbers: Sequence[float], width: int, height: int) -> Augmentation:
    box, flip = _crop(views, numbers, width, height), numbers[0] < views.flip
    if not views.operations():
        return Augmentation(box, flip)
    operations, moved = list[Operation](), {}
    if (rand := views.rand_augment) is not None:
        operations += _layers(rand, numbers[_LAYERS:])
        moved = {"interpolation": InterpolationMode(rand.interpolation), "fill": rand.fill}
    if views.color_jitter is not None:
        operations += _jitter(views.color_jitter, numbers[_JITTERED:_GREY])
    if views.grayscale is not None and numbers[_GREY] < views.grayscale:
        operations.append(Operation("Grayscale"))
    if views.blur is not None:
        operations += _blur(views.blur, *numbers[_BLURRED:_ERASED])
    erasure = None if views.erase is None else _erasure(views.erase, numbers[_ERASED:_LAYERS])
    return Augmentation(box, flip, tuple(operations), erasure, **moved)


def _crop(views: Views, numbers: Sequence[float], width: int, height: int) -> Box:
    """torchvision's RandomResizedCrop: area uniform in crop_scale, ratio log-uniform in crop_ratio, ten attempts, else the largest
    central crop within the ratios. The flip's draw comes first, whatever the number of attempts.
    """
    low, high = (math.log(ratio) for ratio in views.crop_ratio)
    for attempt in range(_ATTEMPTS):
        for_area, for_ratio, for_top, for_left = numbers[1 + 4 * attempt : 5 + 4 * attempt]
        area = width * height * (views.crop_scale[0] + (views.crop_scale[1] - views.crop_scale[0]) * for_area)
        ratio = math.exp(low + (high - low) * for_ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(for_left * (width - w + 1)), int(for_top * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < views.crop_ratio[0]:
        h = round(width / views.crop_ratio[0])
    elif width / height > views.crop_ratio[1]:
        w = round(height * views.crop_ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _layers(settings: RandAugment, numbers: Sequence[float]) -> list[Operation]:
    operations = []
    for layer in range(settings.layers):
        for_layer, for_name, for_magnitude, for_sign = numbers[_OF_A_LAYER * layer : _OF_A_LAYER * (layer + 1)]
        if for_layer < settings.probability:
            magnitude = settings.magnitude
            if settings.std > 0:  # a draw of 0 has no quantile
                magnitude = NormalDist(magnitude, settings.std).inv_cdf(max(for_magnitude, 2.0**-53))
            part = max(0.0, min(magnitude, MOST_MAGNITUDE)) / MOST_MAGNITUDE
            name = RAND_AUGMENT[int(for_name * len(RAND_AUGMENT))]
            operations.append(Operation(name, _strength(name, part, for_sign < 0.5)))
    return operations


def _strength(name: str, part: float, negative: bool) -> float:
    """Of an operation of RandAugment at `part`, from 0 to 1, of its range, as torchvision's `RandAugment` has the ranges."""
    if name == "Posterize":
        return round(8 - 4 * part)
    if name == "Solarize":
        return 255 * (1 - part)
    strength = _RANGES.get(name, 0.0) * part
    return -strength if negative else strength


def _jitter(settings: ColorJitter, numbers: Sequence[float]) -> list[Operation]:
    if numbers[0] >= settings.probability:
        return []
    ranges = {"Brightness": settings.brightness, "Contrast": settings.contrast, "Color": settings.saturation, "Hue": settings.hue}
    drawn = zip(numbers[1:5], ranges.items(), numbers[5:9], strict=True)
    return [Operation(name, most * (2 * number - 1)) for _, (name, most), number in sorted(drawn) if most > 0]


def _blur(settings: Blur, for_blur: float, for_sigma: float) -> list[Operation]:
    low, high = settings.sigma
    return [Operation("Blur", (low + (high - low) * for_sigma) / _SIGMA_ROWS)] if for_blur < settings.probability else []


def _erasure(settings: Erase, numbers: Sequence[float]) -> Erasure | None:
    """torchvision's RandomErasing on a square: none where ten attempts give no rectangle that is smaller than the picture."""
    if numbers[0] >= settings.probability:
        return None
    low, high = (math.log(ratio) for ratio in settings.ratio)
    for attempt in range(_ATTEMPTS):
        for_area, for_ratio = numbers[4 + 2 * attempt : 6 + 2 * attempt]
        area = settings.scale[0] + (settings.scale[1] - settings.scale[0]) * for_area
        ratio = math.exp(low + (high - low) * for_ratio)
        height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if height < 1 and width < 1:
            value = int(numbers[3] * 2**53) if settings.value == "noise" else settings.value
            return Erasure(height, width, numbers[1], numbers[2], value)
    return None


def altered(picture: Image.Image, augmentation: Augmentation) -> NDArray[np.uint8]:
    """The operations and the erasure on an RGB picture of a tower's size, already cropped and mirrored: (H, W, 3) uint8."""
    for operation in augmentation.operations:
        picture = OPERATIONS[operation.name](picture, operation.strength, augmentation)
    pixels = np.array(picture)
    if augmentation.erasure is not None:
        _erase(pixels, augmentation.erasure)
    return pixels


def _erase(pixels: NDArray[np.uint8], erasure: Erasure) -> None:
    height, width = pixels.shape[:2]
    h, w = (max(1, min(round(part * size), size - 1)) for part, size in ((erasure.height, height), (erasure.width, width)))
    top, left = int(erasure.top * (height - h + 1)), int(erasure.left * (width - w + 1))
    pixels[top : top + h, left : left + w] = _noise(erasure.value, h, w) if isinstance(erasure.value, int) else erasure.value


def _noise(key: int, h: int, w: int) -> NDArray[np.uint8]:
    """(h, w, 3) bytes; those of a smaller rectangle are the first of a larger one's."""
    raw = np.asarray(np.random.Philox(key=key).random_raw(-(-3 * h * w // 8)), "<u8")
    return raw.view(np.uint8)[: 3 * h * w].reshape(h, w, 3)


_Function = Callable[[Image.Image, float, Augmentation], Image.Image]


def _moved(image: Image.Image, how: Augmentation, shear: tuple[float, float], shift: tuple[float, float]) -> Image.Image:
    """Sheared about the upper left corner by these tangents, or shifted by these fractions of the picture, towards zero in pixels."""
    degrees = [math.degrees(math.atan(part)) for part in shear]
    pixels = [int(part * size) for part, size in zip(shift, image.size, strict=True)]
    centre = [0, 0] if any(shear) else None
    moved: Image.Image = functional.affine(
        image, 0.0, pixels, 1.0, degrees, interpolation=how.interpolation, fill=list(how.fill), center=centre
    )
    return moved


def _rotated(image: Image.Image, degrees: float, how: Augmentation) -> Image.Image:
    rotated: Image.Image = functional.rotate(image, degrees, interpolation=how.interpolation, fill=list(how.fill))
    return rotated


def _blurred(image: Image.Image, sigma: float, how: Augmentation) -> Image.Image:
    """By a kernel that reaches three sigma, as far as the picture allows."""
    pixels = sigma * image.height
    size = [2 * min(math.ceil(3 * pixels), side - 1) + 1 for side in image.size]
    blurred: Image.Image = functional.gaussian_blur(image, size, [pixels, pixels])
    return blurred


# RandAugment's, in torchvision's order, with the largest strength of those that have a range and a sign.
_RANGES = {
    **{"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 150 / 331, "TranslateY": 150 / 331, "Rotate": 30.0},
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9),
}
RAND_AUGMENT = ("Identity", *_RANGES, "Posterize", "Solarize", "AutoContrast", "Equalize")
OPERATIONS: dict[str, _Function] = {
    "Identity": lambda image, _, how: image,
    "ShearX": lambda image, tangent, how: _moved(image, how, (tangent, 0.0), (0.0, 0.0)),
    "ShearY": lambda image, tangent, how: _moved(image, how, (0.0, tangent), (0.0, 0.0)),
    "TranslateX": lambda image, part, how: _moved(image, how, (0.0, 0.0), (part, 0.0)),
    "TranslateY": lambda image, part, how: _moved(image, how, (0.0, 0.0), (0.0, part)),
    "Rotate": _rotated,
    "Brightness": lambda image, more, _: functional.adjust_brightness(image, 1 + more),
    "Color": lambda image, more, _: functional.adjust_saturation(image, 1 + more),
    "Contrast": lambda image, more, _: functional.adjust_contrast(image, 1 + more),
    "Sharpness": lambda image, more, _: functional.adjust_sharpness(image, 1 + more),
    "Posterize": lambda image, bits, _: functional.posterize(image, int(bits)),
    "Solarize": lambda image, threshold, _: functional.solarize(image, threshold),
    "AutoContrast": lambda image, _, how: functional.autocontrast(image),
    "Equalize": lambda image, _, how: functional.equalize(image),
    "Hue": lambda image, turn, _: functional.adjust_hue(image, turn),
    "Grayscale": lambda image, _, how: functional.rgb_to_grayscale(image, 3),
    "Blur": _blurred,
}
