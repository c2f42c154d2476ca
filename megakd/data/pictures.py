"""A picture in training: how much of it is decoded and what resizes its crop, as `data.decode` and `data.resampling` say.

Its size is known before it is decoded; by that the augmentation is drawn, and each tower's crop is resized once. What a tower gets depends
on the picture, the augmentation and its own input alone, never on the other towers of a run: so a store has the same, bit for bit.

Legend: H x W a tower's input size.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from megakd.data.augmentation import Augmentation, Box, altered
from megakd.data.transforms import opened, rgb_image, turn_of
from megakd.recipe import Data
from megakd.recipe.schema import Resampling

View = tuple[int, int, int]  # a TowerView's `train_pixels`

# Crops of six times the target and more are first averaged over whole pixels, to three times the target at least: less than half the
# time, for .2 levels in the mean on photo-like pictures, 1.7 on a checkerboard of 20-pixel squares (4 at a gap of 2).
_REDUCING_GAP = 3.0
_SHRINKS = (8, 4, 2)  # libjpeg decodes to 1/8, 1/4 and 1/2 of the sides
_JPEG = ("JPEG", "MPO")  # MPO: a JPEG that holds further pictures, as telephones write it
# Of what turns an image upright: whether its sides change places, and whether it runs backwards across and down then.
_TURNED = {
    None: (False, False, False),
    Image.Transpose.FLIP_LEFT_RIGHT: (False, True, False),
    Image.Transpose.ROTATE_180: (False, True, True),
    Image.Transpose.FLIP_TOP_BOTTOM: (False, False, True),
    Image.Transpose.TRANSPOSE: (True, False, False),
    Image.Transpose.ROTATE_270: (True, True, False),
    Image.Transpose.TRANSVERSE: (True, True, True),
    Image.Transpose.ROTATE_90: (True, False, True),
}
_TORCH_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


class Picture:
    """An encoded image for the towers of a run. size: (width, height) of its stored pixels when upright.

    Raises BadSample as `rgb_image`, where the decoder waits for the crop only when pixels are asked for.
    """

    def __init__(self, content: bytes, data: Data) -> None:
        self._content, self._data = content, data
        self._decoded: dict[int, Image.Image] = {}
        self._backwards = (False, False)
        size = self._size_before_decoding() if data.decode == "scaled" else None
        self._scales = size is not None
        self.size = size or self.rgb().size

    def rgb(self, shrink: int = 1) -> Image.Image:
        """In RGB and upright, at 1 / shrink of its sides, rounded up; decoded once for all towers that take it so."""
        if shrink not in self._decoded:
            self._decoded[shrink] = rgb_image(self._content, self._data, shrink)
        return self._decoded[shrink]

    def pixels(self, augmentation: Augmentation, view: View) -> NDArray[np.uint8]:
        """The augmented crop at a tower's size: (3, H, W) uint8, not contiguous."""
        shrink = self._shrink(augmentation.box, view)
        image = self.rgb(shrink)
        if shrink > 1:
            # the last pixel, which may be of fewer stored ones, is the first where the image runs backwards
            sides = zip(image.size, self.size, self._backwards, strict=True)
            x, y = (decoded * shrink - stored if backwards else 0 for decoded, stored, backwards in sides)
            left, top, right, bottom = augmentation.box
            box = ((left + x) / shrink, (top + y) / shrink, (right + x) / shrink, (bottom + y) / shrink)
            augmentation = replace(augmentation, box=box)
        return train_pixels(image, augmentation, view, self._data.resampling)

    def _size_before_decoding(self) -> tuple[int, int] | None:
        """As the header has it; None where the format has one size alone, and all of it is decoded."""
        image = opened(self._content, self._data.max_pixels)
        if image.format not in _JPEG:
            return None
        swapped, *backwards = _TURNED[turn_of(image) if self._data.orientation == "exif" else None]
        self._backwards = (backwards[0], backwards[1])
        return image.size[::-1] if swapped else image.size

    def _shrink(self, box: Box, view: View) -> int:
        if not self._scales:
            return 1
        (left, top, right, bottom), (height, width, _) = box, view
        room = min((right - left) / width, (bottom - top) / height)
        return next((shrink for shrink in _SHRINKS if shrink <= room), 1)


def train_pixels(image: Image.Image, augmentation: Augmentation, view: View, resampling: Resampling) -> NDArray[np.uint8]:
    """The augmented crop of an RGB image at a tower's size: (3, H, W) uint8, not contiguous."""
    resized_HW3 = (_by_torch if resampling == "torch" else _by_pillow)(image, augmentation.box, view)
    if augmentation.flip:
        resized_HW3 = resized_HW3[:, ::-1]
    if not augmentation.crops_alone:
        resized_HW3 = altered(Image.fromarray(np.ascontiguousarray(resized_HW3)), augmentation)
    return resized_HW3.transpose(2, 0, 1)


def _by_pillow(image: Image.Image, box: Box, view: View) -> NDArray[np.uint8]:
    """(H, W, 3). Pixels beside the box count at its edges."""
    height, width, resample = view
    return np.asarray(image.resize((width, height), Image.Resampling(resample), box=box, reducing_gap=_REDUCING_GAP))


def _by_torch(image: Image.Image, box: Box, view: View) -> NDArray[np.uint8]:
    """(H, W, 3), of the box alone, its sides rounded to whole pixels of the decoded image: torchvision's order, crop and then resize.

    torch's filter for bytes is written for vector instructions, and gives the same numbers where a processor lacks them. It takes
    four channels as Pillow stores them, so that nothing is packed into three before it is small.
    """
    height, width, resample = view
    left, top, right, bottom = (round(side) for side in box)
    crop = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    pixels = torch.frombuffer(bytearray(crop.tobytes("raw", "RGBX")), dtype=torch.uint8).view(1, crop.height, crop.width, 4)
    mode = _TORCH_MODES[Image.Resampling(resample)]
    resized_14HW = interpolate(pixels.permute(0, 3, 1, 2), (height, width), mode=mode, antialias=True)
    return resized_14HW[0, :3].permute(1, 2, 0).numpy()
