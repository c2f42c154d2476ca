"""Images that are no plain RGB: one stated rule for each kind, the same in training, evaluation and answering; the rest is counted."""

import io
import time
import warnings

import numpy as np
import pytest
from open_clip.transform import PreprocessCfg
from PIL import Image

from megakd.data.augmentation import Augmentation
from megakd.data.bad_samples import BadSample
from megakd.data.pictures import Picture
from megakd.data.transforms import as_rgb, decode, evaluation_pixels, rgb_image
from megakd.recipe import Data
from megakd.vqa.loader import ImageProcessor
from support.shards import bomb_png, png

DATA = Data(max_pixels=1_000_000)
RAMP = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)


def stored(image: Image.Image, form: str, **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def grey(data: bytes) -> np.ndarray:
    image = rgb_image(data, DATA)
    assert image.mode == "RGB"
    return np.asarray(image)[..., 0].astype(int)


@pytest.mark.parametrize(
    "data",
    [
        stored(Image.fromarray((RAMP * 65535).round().astype(np.uint16)), "PNG"),
        stored(Image.fromarray((RAMP * 65535).round().astype(np.uint16)), "TIFF"),
        stored(Image.fromarray((RAMP * 65535).round().astype(np.int32)), "TIFF"),
        stored(Image.fromarray(RAMP), "TIFF"),
        stored(Image.fromarray(RAMP * 255), "TIFF"),
        stored(Image.fromarray((RAMP * 255).round().astype(np.int32)), "TIFF"),
        stored(Image.fromarray((RAMP * 255).round().astype(np.uint8)), "PNG"),
    ],
    ids=["png16", "tiff16", "int32", "float1", "float255", "int255", "png8"],
)
def test_a_ramp_of_any_depth_is_the_same_ramp(data: bytes) -> None:
    assert np.abs(grey(data) - RAMP * 255).max() <= 1


@pytest.mark.parametrize(
    "values",
    [
        RAMP * 1000,
        RAMP - 0.5,
        np.where(RAMP > 0.5, np.nan, RAMP),
        RAMP + np.inf,
        (RAMP * 2**30).astype(np.int32),
        (-RAMP * 99).astype(np.int32),
    ],
    ids=["float1000", "negative", "nan", "inf", "int30", "negative_int"],
)
def test_values_of_no_known_range_are_bad_and_no_white_square(values: np.ndarray) -> None:
    with pytest.raises(BadSample, match="no known range") as caught:
        rgb_image(stored(Image.fromarray(values.astype(values.dtype if values.dtype == np.int32 else np.float32)), "TIFF"), DATA)
    assert caught.value.reason == "bad_pixels"


def _see_through() -> list[bytes]:
    """Black where nothing is to be seen, half green."""
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (0, 200, 0, 255)
    colours = Image.fromarray(pixels, "RGBA")
    palette = Image.fromarray(np.repeat(np.array([1, 1, 0, 0], np.uint8)[:, None], 4, axis=1), "P")
    palette.putpalette([0, 0, 0, 0, 200, 0])
    keyed = Image.fromarray(pixels[..., :3].copy(), "RGB")
    return [
        stored(colours, "PNG"),
        stored(colours, "WEBP", lossless=True),
        stored(palette, "PNG", transparency=0),
        stored(palette, "GIF", transparency=0),
        stored(keyed, "PNG", transparency=(0, 0, 0)),
    ]


@pytest.mark.parametrize("data", _see_through(), ids=["rgba", "webp", "palette", "gif", "colour_key"])
def test_what_is_transparent_lies_on_white(data: bytes) -> None:
    pixels = np.asarray(rgb_image(data, DATA))
    assert (pixels[:2] == (0, 200, 0)).all()
    assert (pixels[2:] == 255).all()


@pytest.mark.parametrize("data", _see_through(), ids=["rgba", "webp", "palette", "gif", "colour_key"])
def test_what_is_transparent_lies_on_black_or_keeps_its_hidden_colour(data: bytes) -> None:
    black = np.asarray(rgb_image(data, Data(transparency="black")))
    assert (black[:2] == (0, 200, 0)).all()
    assert not black[2:].any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of bare conversions of palettes with transparency
        bare = np.asarray(decode(data, 10**6).convert("RGB"))
    assert np.array_equal(rgb_image(data, Data(transparency="drop")), bare)


def test_half_transparent_pixels_are_mixed_with_the_colour() -> None:
    half = stored(Image.new("RGBA", (2, 2), (200, 100, 0, 51)), "PNG")  # a fifth
    mixed = {colour: np.asarray(rgb_image(half, Data(transparency=colour)))[0, 0].tolist() for colour in ("white", "black", "drop")}
    assert mixed == {"white": [244, 224, 204], "black": [40, 20, 0], "drop": [200, 100, 0]}


def test_an_orientation_that_is_ignored_turns_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 9, 3), dtype=np.uint8))
    data = stored(lying, "PNG", exif=exif)
    assert np.array_equal(rgb_image(data, Data(orientation="ignore")), lying)
    assert rgb_image(data, Data()).size == (4, 9)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_exif_orientation_turns_the_image_upright_once(orientation: int, form: str) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # the upper left corner is white
    turn = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM}
    turn |= {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    image = Image.fromarray(upright)
    as_shot = image.transpose(turn[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    found = rgb_image(stored(as_shot, form, exif=exif, **more), DATA)
    assert np.abs(np.asarray(as_rgb(found, DATA)).astype(int) - upright).max() < 30


@pytest.mark.parametrize("orientation", ["exif", "ignore"])
@pytest.mark.parametrize("transparency", ["white", "black", "drop"])
def test_training_evaluation_and_questions_see_the_same_pixels(orientation: str, transparency: str) -> None:
    view, data_as = PreprocessCfg(size=16, resize_mode="squash"), Data(orientation=orientation, transparency=transparency)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    files = [
        *_see_through(),
        stored(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
        stored(Image.fromarray(noise), "PNG", exif=exif),
    ]
    for data in files:
        picture = Picture(data, data_as)
        seen = picture.pixels(Augmentation((0, 0, *picture.size), False), (16, 16, int(Image.Resampling.BICUBIC)))
        assert np.array_equal(seen, evaluation_pixels(rgb_image(data, data_as), view))
        assert np.array_equal(seen, ImageProcessor(view, data_as, "tower").pixels(data))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_seen(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    found = rgb_image(stored(frames[0], form, save_all=True, append_images=frames[1:]), DATA)
    assert np.abs(np.asarray(found)[0, 0].astype(int) - (255, 0, 0)).max() < 5


def test_cmyk_becomes_rgb_by_pil() -> None:
    found = np.asarray(rgb_image(stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), DATA))
    assert np.abs(found[0, 0].astype(int) - (255, 0, 0)).max() < 5


def _thin_png(width: int, height: int) -> bytes:
    """A black picture of a few hundred bytes, whole."""
    return png(width, height, bytes((width + 7) // 8 + 1) * height, depth=1, colour=0)


@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1), (1, 201), (4020, 20 - 1)])
def test_thin_images_are_bad_before_they_are_decoded(size: tuple[int, int]) -> None:
    start = time.process_time()
    with pytest.raises(BadSample) as caught:
        decode(_thin_png(*size) if max(size) < 10**6 else bomb_png(*size), 50_000_000)
    assert caught.value.reason == "too_thin"
    assert time.process_time() - start < 5


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("target", [16, (8, 24), 224])
@pytest.mark.parametrize("size", [(1, 200), (200, 1), (3, 600)])
def test_the_thinnest_that_is_taken_passes_every_resize_mode(resize_mode, target, size) -> None:
    config = PreprocessCfg(size=target, resize_mode=resize_mode)
    assert evaluation_pixels(rgb_image(_thin_png(*size), DATA), config).shape[0] == 3
