"""`data.decode` and `data.resampling`: what they change of a pair's pixels and what not, for every kind of file, ranks and workers."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import functional

from megakd.data import transforms
from megakd.data.augmentation import Augmentation, draw
from megakd.data.bad_samples import BadCounter, BadSample
from megakd.data.pictures import Picture
from megakd.data.transforms import rgb_image
from megakd.recipe import Data, Views
from support.loaders import BATCH, TOWERS, take
from support.shards import jpeg, open_shards, png, write_tar

FULL, SCALED = Data(), Data(decode="scaled")
KINDS = [Data.model_validate({"decode": decode, "resampling": made}) for decode in ("full", "scaled") for made in ("pillow", "torch")]
VIEW = (32, 32, int(Image.Resampling.BICUBIC))


def photographs() -> list[Image.Image]:
    """scikit-learn's two, 640 x 427."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def stored(image: Image.Image, form: str = "JPEG", **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def change(one: np.ndarray, other: np.ndarray) -> tuple[float, int]:
    """Mean and largest difference in levels of 255."""
    difference = np.abs(one.astype(int) - other)
    return float(difference.mean()), int(difference.max())


@pytest.fixture
def shrinks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many of the stored rows a row of each decoded image is, as it is decoded."""
    seen: list[int] = []
    plain = transforms.decode

    def decode(data: bytes, max_pixels: int, shrink: int = 1) -> Image.Image:
        image = plain(data, max_pixels, shrink)
        with Image.open(io.BytesIO(data)) as header:
            seen.append(round(header.height / image.height))
        return image

    monkeypatch.setattr(transforms, "decode", decode)
    return seen


def test_by_default_pixels_are_pillows_of_the_whole_image() -> None:
    """As before these keys were known."""
    for image, position in itertools.product(photographs(), range(4)):
        data = stored(image, quality=90)
        picture, whole = Picture(data, FULL), rgb_image(data, FULL)
        augmentation = draw(Views(), 0, position, *picture.size)
        resized = whole.resize((32, 32), Image.Resampling.BICUBIC, box=augmentation.box, reducing_gap=3.0)
        expected = np.asarray(resized)[:, :: -1 if augmentation.flip else 1].transpose(2, 0, 1)
        assert np.array_equal(picture.pixels(augmentation, VIEW), expected)


@pytest.mark.parametrize(("mode", "interpolation"), [("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)])
@pytest.mark.parametrize("size", [(8, 8), (40, 24), (224, 224), (500, 700)])  # the last is larger than the crop
def test_torch_resizes_within_a_level_or_two_of_torchvisions_crop_and_resize_of_an_image(
    mode: str, interpolation: Image.Resampling, size: tuple[int, int]
) -> None:
    for image in photographs():
        picture = Picture(stored(image, quality=90), Data(resampling="torch"))
        box = (31, 17, 600, 401)
        seen = picture.pixels(Augmentation(box, False), (*size, int(interpolation)))
        expected = functional.resized_crop(picture.rgb(), 17, 31, 384, 569, list(size), functional.InterpolationMode(mode))
        mean, largest = change(seen, np.asarray(expected).transpose(2, 0, 1))
        assert mean < 0.05
        assert largest <= (2 if size == (500, 700) else 1)
        assert np.array_equal(picture.pixels(Augmentation(box, True), (*size, int(interpolation))), seen[:, :, ::-1])


_DIGEST = """
import hashlib, io, sys
import numpy as np
from PIL import Image
from megakd.data.augmentation import Augmentation
from megakd.data.pictures import Picture
from megakd.recipe import Data
import torch
picture = Picture(sys.stdin.buffer.read(), Data(resampling="torch"))
seen = [picture.pixels(Augmentation((3, 5, 613, 420), True), (size, size, filter_)) for size in (24, 224) for filter_ in (2, 3)]
print(torch.backends.cpu.get_cpu_capability(), hashlib.sha256(b"".join(np.ascontiguousarray(one).tobytes() for one in seen)).hexdigest())
"""


@pytest.mark.slow
def test_torchs_resampling_gives_the_same_with_and_without_vector_instructions() -> None:
    """So a store made on one machine is of the pixels that another one makes."""
    data, found = stored(photographs()[0]), []
    for capability in ("default", "avx2"):
        environ = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-P", "-c", _DIGEST], input=data, env=environ, capture_output=True, check=True)
        found.append(done.stdout.split())
    assert found[0][0] == b"DEFAULT"
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(("side", "shrink"), [(63, 1), (64, 2), (127, 2), (128, 4), (256, 8), (600, 8)])
def test_a_crop_is_decoded_so_small_as_it_still_fills_the_towers_input(side: int, shrink: int, shrinks: list[int]) -> None:
    picture = Picture(stored(photographs()[0].resize((640, 600))), SCALED)
    assert (picture.size, shrinks) == ((640, 600), [])  # the header's
    assert picture.pixels(Augmentation((0, 0, side, side), False), VIEW).shape == (3, 32, 32)
    assert shrinks == [shrink]


def test_each_tower_gets_what_it_would_get_alone_and_an_image_is_decoded_once_for_those_of_one_scale(shrinks: list[int]) -> None:
    data, augmentation = stored(photographs()[1]), Augmentation((10, 20, 400, 420), False)
    views = [(size, size, VIEW[2]) for size in (90, 97, 40)]
    for settings in KINDS:
        shrinks.clear()
        picture = Picture(data, settings)
        together = [picture.pixels(augmentation, view) for view in views]
        assert shrinks == ([1] if settings.decode == "full" else [4, 8])
        alone = [Picture(data, settings).pixels(augmentation, view) for view in views]
        assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resampling", ["pillow", "torch"])
def test_a_scaled_picture_is_the_same_picture(orientation: int, resampling: str) -> None:
    """Of odd sides, turned by EXIF in every way. torch's crop moves by up to half a decoded pixel, Pillow's stays in its place."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(photographs()[0].crop((0, 0, 633, 417)), quality=88, exif=exif)  # a quarter of a pixel is left over at 1/4
    whole, scaled = (Picture(data, Data.model_validate({"decode": kind, "resampling": resampling})) for kind in ("full", "scaled"))
    assert whole.size == scaled.size == ((417, 633) if orientation > 4 else (633, 417))
    for position in range(2):
        augmentation = draw(Views(crop_scale=(0.8, 1.0)), 0, position, *whole.size)
        mean, _ = change(whole.pixels(augmentation, (96, 96, 3)), scaled.pixels(augmentation, (96, 96, 3)))
        assert 0 < mean < (3 if resampling == "pillow" else 8)
        mirrored, _ = change(whole.pixels(augmentation, (96, 96, 3)), scaled.pixels(augmentation, (96, 96, 3))[:, :, ::-1])
        assert mirrored > 20


def test_what_libjpeg_does_not_scale_is_decoded_as_ever() -> None:
    image = photographs()[0]
    augmentation = Augmentation((4, 4, 404, 404), False)
    for form in ("PNG", "WEBP", "BMP", "TIFF"):
        data = stored(image, form)
        assert np.array_equal(Picture(data, SCALED).pixels(augmentation, VIEW), Picture(data, FULL).pixels(augmentation, VIEW))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "LA"])
def test_images_of_every_mode_become_rgb_before_they_are_resized(mode: str) -> None:
    image = photographs()[0].resize((200, 150)).convert(mode)
    data, augmentation = stored(image, "JPEG" if mode in ("L", "CMYK") else "PNG"), Augmentation((0, 0, 190, 140), False)
    plain = Picture(data, FULL).pixels(augmentation, VIEW)
    for settings in KINDS[1:]:
        mean, _ = change(Picture(data, settings).pixels(augmentation, VIEW), plain)
        assert mean < 5


def test_the_same_files_are_bad_for_the_same_reason_however_they_are_decoded() -> None:
    rng, whole = np.random.default_rng(0), bytearray(stored(photographs()[0].resize((160, 120)), quality=85))
    files = [bytes(whole[:cut]) for cut in (0, 3, 200, len(whole) // 2, len(whole) - 30)]
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(20, len(whole), 6):
            damaged[place] ^= 1 << int(rng.integers(8))
        files.append(bytes(damaged))
    files += [b"no picture", stored(Image.new("RGB", (40, 30)), "PNG")[:-40], png(9000, 9000, b""), stored(Image.new("RGB", (1, 300)))]

    def fate(data: bytes, settings: Data) -> str:
        try:
            picture = Picture(data, settings)
            picture.pixels(Augmentation((0, 0, *picture.size), False), VIEW)
        except BadSample as bad:
            return bad.reason
        return "used"

    fates = [[fate(data, settings) for data in files] for settings in KINDS]
    assert {"used", "corrupt_image", "too_large", "too_thin"} == set(fates[0])
    assert fates[1:] == [fates[0]] * 3


@pytest.mark.parametrize("settings", KINDS[1:], ids=["torch", "scaled", "scaled-torch"])
def test_any_ranks_and_workers_give_the_same_batches_with_their_bad_samples(tmp_path: Path, settings: Data) -> None:
    members = [member for number in range(24) for member in ((f"{number}.jpg", jpeg(number, (120, 90))), (f"{number}.txt", b"text"))]
    members += [("cut.jpg", jpeg(1, (120, 90))[:-300]), ("cut.txt", b"text")]
    tar = write_tar(tmp_path / "0.tar", members)
    shards = open_shards(str(tar), **settings.model_dump(include={"decode", "resampling"}))
    plain = take(open_shards(str(tar)), 5)
    expected = take(shards, 5)
    ranks = [take(shards, 5, rank=rank, world=2, workers=2) for rank in range(2)]
    bad = BadCounter()
    for step, whole in enumerate(expected):
        for name in TOWERS:
            assert torch.equal(torch.cat([rank[step].pixels[name] for rank in ranks]), whole.pixels[name])
        assert not torch.equal(whole.pixels["student"], plain[step].pixels["student"])
        assert torch.equal(whole.index, plain[step].index)
        bad.merge(whole.bad)
    assert bad.counts["corrupt_image"] > 0
    assert "0.tar: cut" in bad.examples["corrupt_image"]
    assert bad.seen == 5 * BATCH + bad.total
