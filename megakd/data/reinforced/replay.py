"""A recorded augmentation, applied to an image at a tower's size as the generator applied it at the teacher's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from megakd.data.augmentation import Augmentation, Operation, altered
from megakd.data.bad_samples import BadSample
from megakd.data.transforms import rgb_image
from megakd.recipe import Data

# Their numbers in .paug.json: training/dr/transforms.py, RandAugment.op_names.
OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
)
_FILTERS = {Image.Resampling.BILINEAR: InterpolationMode.BILINEAR, Image.Resampling.BICUBIC: InterpolationMode.BICUBIC}


@dataclass(frozen=True)
class RecordedView:
    """A crop in pixels of the stored image, resized to the tower; mirrored if `flip`; then the operations.

    Strengths are torchvision's; shifts are in pixels of the size at which the teachers saw it.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool
    operations: tuple[Operation, ...]

    def pixels(self, image: Image.Image, view: tuple[int, int, int], recorded: int) -> NDArray[np.uint8]:
        """(3, H, W) uint8, not contiguous. view: a TowerView's `train_pixels`; recorded: rows and columns that the teachers saw.

        At that size the very pixels of the generator: black behind what moves, nearest neighbours, no antialiasing beyond the crop. At
        another size shifts are as large a part of the picture, where the generator's own training code keeps their pixels.
        Raises BadSample, bad_embedding, for a crop that lies outside of the image: it is not the one that was embedded.
        """
        if self.top + self.height > image.height or self.left + self.width > image.width:
            place = [self.top, self.left, self.height, self.width]
            raise BadSample(
                "bad_embedding",
                f"the crop {place} of .paug.json is outside of {image.width} x {image.height} pixels: it is of another image",
            )
        height, width, resample = view
        crop = (self.top, self.left, self.height, self.width)
        picture = functional.resized_crop(image, *crop, [height, width], _FILTERS[Image.Resampling(resample)])
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else picture
        operations = tuple(_in_parts(one, recorded) for one in self.operations)
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        return altered(picture, Augmentation(box, self.flip, operations)).transpose(2, 0, 1)


def _in_parts(operation: Operation, recorded: int) -> Operation:
    """Shifts as parts of the picture, which `altered` takes."""
    if not operation.name.startswith("Translate"):
        return operation
    part = operation.strength / recorded
    # whole pixels are cut off towards zero: a rounded quotient must not lose one
    return replace(operation, strength=math.nextafter(part, math.copysign(math.inf, part)))


def recorded_image(content: bytes, data: Data) -> Image.Image:
    """The image as the generator read it, in RGB, whatever `data` says of orientation and transparency: crops count its own pixels.

    scripts/gen.py: `convert("RGBA").convert("RGB")`. Raises BadSample as `rgb_image`.
    """
    return rgb_image(content, data.model_copy(update={"orientation": "ignore", "transparency": "drop"}))
