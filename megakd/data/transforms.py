"""From an image's bytes to RGB, how a tower sees it, and its pixels in an evaluation; those of training are made in `pictures.py`.

Pixels stay uint8 until `normalise`, on the device: workers then send a quarter of the bytes.
Legend: B batch, H x W a tower's input size, L its context length.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import hashlib
import io
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from megakd.data.bad_samples import BadSample
from megakd.data.caption_tokens import PlainCaptions, Tokenize, plain_captions
from megakd.recipe import Data

if TYPE_CHECKING:
    from open_clip.transform import PreprocessCfg

# Only formats that shards hold: PIL would also start Ghostscript for a file that calls itself an EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# Resized by its shorter side, a thin image of 312 bytes would take 13 GB.
_THINNEST = 200
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _remembering_nothing(tokenizer: object) -> dict[str, Any]:
    """What it holds; not `cache`, in which open_clip's tokenizer remembers the words that it has split."""
    return {name: value for name, value in vars(tokenizer).items() if name != "cache"}


class _TokenizerPickler(pickle.Pickler):
    """For digests, which nobody unpickles: a tokenizer that another holds remembers nothing either."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(getattr(obj, "__dict__", None), dict) and isinstance(vars(obj).get("cache"), dict):
            return copyreg.__newobj__, (type(obj),), _remembering_nothing(obj)  # type: ignore[attr-defined]
        return NotImplemented


@dataclass(frozen=True, eq=False)
class TowerView:
    """How a tower sees a sample: its preprocessing and its tokenizer, `tokenize(texts) -> LongTensor (n, L)`. Equal by content.

    Towers with the same `train_pixels`, `evaluation_pixels` or `tokens` share tensors; mean and std are applied on the device.
    """

    preprocess: PreprocessCfg
    tokenize: Tokenize

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenize", plain_captions(self.tokenize))

    @property
    def train_pixels(self) -> tuple[int, int, int]:
        """(H, W, resampling filter): all that training pixels depend on, as a random crop is squashed in every resize mode."""
        return (*input_size(self.preprocess), int(_filter(self.preprocess)))

    @property
    def evaluation_pixels(self) -> tuple[int, int, int, str, int]:
        return (*self.train_pixels, self.preprocess.resize_mode, self.preprocess.fill_color)

    @functools.cached_property
    def tokens(self) -> str:
        """A digest of the tokenizer's content; its identity where it cannot be pickled, by which nothing is shared wrongly."""
        state: Any = self.tokenize.wrapped if isinstance(self.tokenize, PlainCaptions) else self.tokenize
        if hasattr(state, "__dict__") and not isinstance(state, type) and not hasattr(state, "__code__"):
            state = (type(state), _remembering_nothing(state))
        try:
            content = io.BytesIO()
            _TokenizerPickler(content).dump(state)
            return hashlib.sha256(content.getvalue()).hexdigest()
        except Exception:  # pickling runs any tokenizer's code
            return f"id {id(self.tokenize)}"

    def _content(self) -> tuple[Any, ...]:
        return (self.evaluation_pixels, tuple(self.preprocess.mean), tuple(self.preprocess.std), self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TowerView) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())


def decode(data: bytes, max_pixels: int, shrink: int = 1) -> Image.Image:
    """The image in its stored mode, of several frames the first. Raises BadSample: corrupt_image, too_large or too_thin.

    shrink: 2, 4 or 8 gives a JPEG alone with a pixel for so many of its rows and columns, the last rounded up, by libjpeg's smaller
    inverse transform: the others' numbers are never computed.
    """
    image = opened(data, max_pixels)
    with _damage_told():
        if shrink > 1:
            image.draft(None, (image.width // shrink, image.height // shrink))
        image.load()
    return image


def opened(data: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read and no pixel decoded. Raises BadSample: corrupt_image, too_large or too_thin."""
    with _damage_told():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise BadSample("too_large", f"{image.width} x {image.height} pixels, data.max_pixels = {max_pixels}")
        if max(image.size) > _THINNEST * min(image.size):
            raise BadSample("too_thin", f"{image.width} x {image.height} pixels: one side is more than {_THINNEST} times the other")
    return image


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    """Whatever PIL raises inside as a BadSample."""
    try:
        yield
    except (BadSample, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too_large", str(error)) from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError, ...
        raise BadSample("corrupt_image", f"{type(error).__name__}: {error}") from error


def rgb_image(content: bytes, data: Data, shrink: int = 1) -> Image.Image:
    """`decode`, then `as_rgb`. Raises BadSample."""
    return as_rgb(decode(content, data.max_pixels, shrink), data)


def as_rgb(image: Image.Image, data: Data) -> Image.Image:
    """RGB, in training, stores, evaluation and answering alike: turned and laid on a colour as `data.orientation` and `data.transparency`
    say, by default upright and on white as img2dataset does; with "ignore" and "drop" it is PIL's plain conversion, as in open_clip.

    16-bit grey is divided by 257, floats in [0, 1] are multiplied by 255, numbers in [0, 255] stay; palettes, CMYK and the rest become RGB
    by PIL; colour profiles are not applied. Raises BadSample, bad_pixels, for other values.
    """
    try:
        return _opaque(_eight_bits(_upright(image) if data.orientation == "exif" else image), data.transparency)
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # PIL has no conversion of LAB, for example, and fails inside damaged palettes
        raise BadSample("bad_pixels", f"{image.mode} cannot become RGB: {type(error).__name__}: {error}") from error


def content_digest(image: Image.Image) -> bytes:
    """128 bits of an image's pixels in RGB, by which equal pictures in different files are known."""
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What turns it upright by its EXIF; None where nothing does."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF
        return None


def _upright(image: Image.Image) -> Image.Image:
    turn = turn_of(image)
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {name: value for name, value in image.info.items() if name == "transparency"}  # or it would be turned again
    return turned


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values: NDArray[Any] = np.asarray(image, dtype=np.float32)
    low, high = (float(values.min()), float(values.max())) if np.isfinite(values).all() else (math.nan, math.nan)
    if image.mode != "F" and (image.mode != "I" or image.format == "PNG" or high > 255) and low >= 0 and high <= 65535:
        values = values / 257
    elif image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif not (low >= 0 and high <= 255):
        raise BadSample("bad_pixels", f"{image.mode} pixels from {low:g} to {high:g}: no known range, so what is white cannot be told")
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _opaque(image: Image.Image, transparency: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        image = image.convert("RGBA")
        if transparency != "drop" and image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, transparency), image)
    return image.convert("RGB")


def evaluation_pixels(image: Image.Image, preprocess: PreprocessCfg) -> NDArray[np.uint8]:
    """open_clip's `image_transform_v2(preprocess, is_train=False)` before its normalisation: (3, H, W) uint8.

    As there, the image is resized and cropped in its own mode and becomes RGB last: published scores depend on it.
    """
    height, width = input_size(preprocess)
    resample = _filter(preprocess)
    mode = preprocess.resize_mode
    if mode == "squash":
        image = image.resize((width, height), resample)
    elif mode == "shortest" and height == width:
        if (short := min(image.size)) != height:
            longer = int(height * max(image.size) / short)
            image = image.resize((height, longer) if image.width <= image.height else (longer, height), resample)
        image = _crop_or_pad(image, height, width, 0)
    elif mode in ("shortest", "longest"):
        pick = max if mode == "longest" else min
        ratio = pick(image.height / height, image.width / width)
        # open_clip takes bicubic for non-square towers, whatever the configuration says
        filter_ = resample if mode == "longest" else Image.Resampling.BICUBIC
        # open_clip fails where a thin image's shorter side rounds to nothing
        image = image.resize((max(1, round(image.width / ratio)), max(1, round(image.height / ratio))), filter_)
        image = _crop_or_pad(image, height, width, preprocess.fill_color if mode == "longest" else 0)
    else:
        raise ValueError(f"resize_mode = {mode!r}: open_clip knows shortest, longest and squash")
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def normalise(pixels: torch.Tensor, preprocess: PreprocessCfg, dtype: torch.dtype) -> torch.Tensor:
    """(pixels / 255 - mean) / std: (B, 3, H, W) of uint8 -> the same of `dtype`, on the pixels' device, computed in float32."""
    # what a plan counts on the meta device is the same every time
    affine = _affine.__wrapped__ if pixels.is_meta else _affine
    shift, gain = affine(tuple(preprocess.mean), tuple(preprocess.std), pixels.device)
    values = pixels.to(torch.float32, copy=True)  # into which the result is written: of 1,024 images at 224 px each copy is 600 MB
    return torch.addcmul(shift, values, gain, out=values).to(dtype)


@functools.cache
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """-mean / std and 1 / (255 std), (3, 1, 1). Copied once: numbers of the host's wait for the device's stream at every copy."""
    with torch.inference_mode(False):  # kept for callers of other modes
        of_mean, of_std = (torch.tensor(each, dtype=torch.float32, device="cpu").view(3, 1, 1) for each in (mean, std))
        return (-of_mean / of_std).to(device), (1 / (255 * of_std)).to(device)


def input_size(preprocess: PreprocessCfg) -> tuple[int, int]:
    """(H, W) of the tower."""
    size = preprocess.size
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[0])) if len(size) == 1 else (int(size[0]), int(size[1]))


def _filter(preprocess: PreprocessCfg) -> Image.Resampling:
    # open_clip's own rule: 'random' and everything else mean bicubic
    return Image.Resampling.BILINEAR if preprocess.interpolation == "bilinear" else Image.Resampling.BICUBIC


def _crop_or_pad(image: Image.Image, height: int, width: int, fill: int) -> Image.Image:
    """The centre, with a border of `fill` in every channel where the image is smaller."""
    if width > image.width or height > image.height:
        extra_w, extra_h = max(width - image.width, 0), max(height - image.height, 0)
        bands = len(image.getbands())
        padded = Image.new(image.mode, (image.width + extra_w, image.height + extra_h), fill if bands == 1 else (fill,) * bands)
        if image.mode == "P" and (palette := image.getpalette()) is not None:
            padded.putpalette(palette)
        padded.paste(image, (extra_w // 2, extra_h // 2))
        image = padded
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
