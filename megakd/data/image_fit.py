"""How a question's picture is brought to the tower's size, `decoder.image_fit`: in training, evaluation and from a bundle alike.

Legend: H x W the tower's input size.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megakd.data.transforms import evaluation_pixels, input_size
from megakd.recipe.vqa import ImageFit

if TYPE_CHECKING:
    from open_clip.transform import PreprocessCfg

# Pixels of a padded picture, 200 MB. One of 200 times its height would take a hundred times its own memory; it is made smaller before.
_MOST_PIXELS = 2**26


def fitted_pixels(image: Image.Image, preprocess: PreprocessCfg, fit: ImageFit) -> NDArray[np.uint8]:
    """(3, H, W) uint8 of an RGB image.

    tower: as its preprocessing evaluates images, which in most crops what is longer than the tower's sides. squash: both sides resized.
    pad: the whole picture, in the middle of a border of the mean colour by which it has the tower's proportions, then resized: LLaVA's
    `image_aspect_ratio = pad`, whose colours are the means of 0 to 255, rounded down.
    """
    if fit == "tower":
        return evaluation_pixels(image, preprocess)
    if fit == "pad":
        image = padded(image, input_size(preprocess), tuple(int(mean * 255) for mean in preprocess.mean))
    return evaluation_pixels(image, dataclasses.replace(preprocess, resize_mode="squash"))


def padded(image: Image.Image, size: tuple[int, int], colour: tuple[int, ...]) -> Image.Image:
    """The whole image in the middle of the smallest one that has the proportions of `size`, (H, W), and holds it."""
    height, width = size
    sides = _around(image, height, width)
    if sides[0] * sides[1] > _MOST_PIXELS:
        image = image.reduce(max(1, int((sides[0] * sides[1] / _MOST_PIXELS) ** 0.5) + 1))
        sides = _around(image, height, width)
    if sides == image.size:
        return image
    fill: Any = colour
    around = Image.new("RGB", sides, fill)
    around.paste(image, ((sides[0] - image.width) // 2, (sides[1] - image.height) // 2))
    return around


def _around(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    """(width, height) of it."""
    return max(image.width, round(image.height * width / height)), max(image.height, round(image.width * height / width))
