"""Scene -> picture. What a caption does not say varies: background, exact place, extent, tilt and shade.

A sprite, the coverage of one shape at one extent, tilt and sub-pixel place, is drawn by Pillow at eight times the resolution, averaged down
and cached: a world needs 2880 of them, and a picture is then three small blends, about 0.1 ms.
"""

from __future__ import annotations

import io
import math
import random
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from megakd.data.shapes.scene import Scene

Pixels = NDArray[np.uint8]
Coverage = NDArray[np.float32]

RGB = {
    "red": (225, 35, 35), "green": (35, 165, 55), "blue": (45, 75, 240), "yellow": (240, 215, 40), "purple": (165, 50, 195),
    "cyan": (45, 210, 220), "white": (242, 242, 242),
}  # fmt: skip
SHADE = 14  # largest change of a colour's channel: less than half the distance to the nearest other colour
EXTENT = {"small": 0.21, "large": 0.325}  # diameter as a fraction of the image; a cell is 0.333
EXTENT_JITTER = (0.93, 1.0, 1.07)
PLACE_JITTER = {"small": 0.045, "large": 0.02}  # largest shift from the cell's middle as a fraction of the image
TILTS = (-9, 0, 9)  # degrees
OVERSAMPLE = 8
SUBPIXEL = 4


def draw_picture(scene: Scene, rng: random.Random, size: int) -> Pixels:
    """The scene as RGB, (size, size, 3) uint8."""
    pad = math.ceil(EXTENT["large"] * size)  # sprites reach over the edge by less than this
    canvas = np.zeros((size + 2 * pad, size + 2 * pad, 3), np.float32)
    canvas[pad : pad + size, pad : pad + size] = _background(rng, size)
    for thing in scene:
        diameter = EXTENT[thing.size] * size * rng.choice(EXTENT_JITTER)
        tilt = rng.choice(TILTS)
        x, y = (_place(index, thing.size, diameter, rng, size) for index in (thing.cell % 3, thing.cell // 3))
        shade = np.array([min(255, max(0, c + rng.randint(-SHADE, SHADE))) for c in RGB[thing.colour]], np.float32)
        coverage = _sprite(thing.shape, round(diameter * 16), tilt, x % SUBPIXEL, y % SUBPIXEL)
        left, top = (pad + place // SUBPIXEL - coverage.shape[0] // 2 for place in (x, y))
        patch = canvas[top : top + coverage.shape[0], left : left + coverage.shape[0]]
        patch += (shade - patch) * coverage
    # noise of -8 to 7, the same on the three channels
    grain = (np.frombuffer(rng.randbytes(size * size), np.uint8) & 15).reshape(size, size, 1).astype(np.float32) - 8
    picture: Pixels = np.clip(canvas[pad : pad + size, pad : pad + size] + grain, 0, 255).astype(np.uint8)
    return picture


def jpeg(pixels: Pixels) -> bytes:
    """JPEG at quality 95 without chroma subsampling: at 4:2:0 the colour of a seven-pixel shape runs into the background."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _place(index: int, thing_size: str, diameter: float, rng: random.Random, size: int) -> int:
    """The middle of a thing along one axis, in quarters of a pixel, at least its radius away from the edge."""
    middle = (index + 0.5) / 3 * size + rng.uniform(-1, 1) * PLACE_JITTER[thing_size] * size
    return round(min(size - diameter / 2, max(diameter / 2, middle)) * SUBPIXEL)


def _background(rng: random.Random, size: int) -> Coverage:
    """A tinted slope from one brightness to another, dark enough for white and for yellow."""
    brightness = rng.uniform(20, 95)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    slope: Coverage = ramp[None, :, None] * rng.uniform(-45, 45) + ramp[:, None, None] * rng.uniform(-45, 45)
    tint = np.array([brightness + rng.uniform(-14, 14) for _ in range(3)], np.float32)
    return slope + tint


@lru_cache(maxsize=4096)
def _sprite(shape: str, sixteenths: int, tilt: int, x_quarter: int, y_quarter: int) -> Coverage:
    """Coverage in [0, 1], (n, n, 1), of a shape of this diameter whose middle lies the given quarters right of and below n // 2."""
    radius = sixteenths / 32
    half = math.ceil(radius * 1.35) + 1
    n = 2 * half + 1
    middle = [half + quarter / SUBPIXEL for quarter in (x_quarter, y_quarter)]
    image = Image.new("L", (n * OVERSAMPLE, n * OVERSAMPLE))
    turn = math.radians(tilt)
    corners = [
        tuple(
            OVERSAMPLE * (m + radius * c)
            for m, c in zip(middle, (a * math.cos(turn) - b * math.sin(turn), a * math.sin(turn) + b * math.cos(turn)), strict=True)
        )
        for a, b in _outline(shape)
    ]
    ImageDraw.Draw(image).polygon(corners, fill=255)
    coverage: Coverage = np.asarray(image.reduce(OVERSAMPLE), np.float32)[:, :, None] / np.float32(255)
    return coverage


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners in units of the radius, x to the right and y down; areas are evened out so that size does not give shape away."""
    if shape == "circle":
        return _regular(24, 0.98)
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0, -1.08), (1.16, 0.9), (-1.16, 0.9)]
    if shape == "star":
        outer, inner = _regular(5, 1.25), _regular(5, 0.5, 36)
        return [corner for pair in zip(outer, inner, strict=True) for corner in pair]
    if shape == "cross":
        arm, wide = 1.08, 0.36
        quarter = [(wide, -arm), (wide, -wide), (arm, -wide)]
        turns = [quarter, [(-y, x) for x, y in quarter], [(-x, -y) for x, y in quarter], [(y, -x) for x, y in quarter]]
        return [corner for turn in turns for corner in turn]
    return [(0, -1.22), (0.8, 0), (0, 1.22), (-0.8, 0)]


def _regular(corners: int, radius: float, start: float = 0.0) -> list[tuple[float, float]]:
    """A regular polygon's corners, the first one straight up, turned by `start` degrees."""
    angles = (math.radians(start + 360 * i / corners) for i in range(corners))
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]
