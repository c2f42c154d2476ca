import dataclasses
import io
import math

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from megakd.data.augmentation import Augmentation, draw
from megakd.data.bad_samples import BadSample
from megakd.data.pictures import train_pixels
from megakd.data.transforms import TowerView, decode, evaluation_pixels, normalise
from megakd.models.text_padding import ToLongest
from megakd.recipe import Views
from support.shards import ByteTokenizer, bomb_png, jpeg


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    generator = np.random.default_rng(size[0])
    small = Image.fromarray(generator.integers(0, 255, (9, 7, 4), dtype=np.uint8), "RGBA")
    image = small.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if mode == "P":  # a palette with a transparent entry, as PNGs of the web have
        image.convert("RGB").quantize(60).save(file, "PNG", transparency=3)
    elif mode == "CMYK":
        image.convert("RGB").convert("CMYK").save(file, "JPEG", quality=95)
    else:
        image.convert(mode).save(file, "PNG")
    decoded = decode(file.getvalue(), 10**7)
    assert decoded.mode == mode
    return decoded


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA"])
@pytest.mark.parametrize("size", [(61, 40), (30, 95), (32, 32), (20, 11), (300, 211)])
@pytest.mark.parametrize("target", [32, (24, 40)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_view_equals_open_clip(resize_mode, mode, size, target, interpolation) -> None:
    config = PreprocessCfg(
        size=target, resize_mode=resize_mode, interpolation=interpolation, fill_color=90, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1)
    )
    image = picture(mode, size)
    expected = image_transform_v2(config, is_train=False)(image)
    pixels = torch.from_numpy(evaluation_pixels(image, config).copy())
    plain = PreprocessCfg(**{**vars(config), "mean": (0.0,) * 3, "std": (1.0,) * 3})
    levels = image_transform_v2(plain, is_train=False)(image) * 255
    assert pixels.shape == levels.shape
    assert (pixels - levels).abs().max() < 0.01
    torch.testing.assert_close(normalise(pixels[None], config, torch.float32)[0], expected, atol=1e-5, rtol=1e-5)


def test_normalise_casts_after_computing_in_float32() -> None:
    config = PreprocessCfg(size=8)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    exact = normalise(pixels, config, torch.float32)
    assert torch.equal(normalise(pixels, config, torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize("size", [(400, 300), (120, 500), (64, 64)])
def test_crops_are_distributed_as_torchvisions(size) -> None:
    width, height = size
    views = Views(crop_scale=(0.3, 1.0), crop_ratio=(0.3, 3.0), flip=0.5)
    count = 3000
    ours = np.array([draw(views, 5, position, width, height).box for position in range(count)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(views.crop_scale), list(views.crop_ratio)) for _ in range(count)])
    ours_ijhw = np.stack([ours[:, 1], ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]], axis=1)
    for column in range(4):
        assert stats.ks_2samp(ours_ijhw[:, column], theirs[:, column]).pvalue > 1e-3, ["top", "left", "height", "width"][column]


def test_every_place_of_a_crop_is_drawn_to_the_last_pixel() -> None:
    views = Views(crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))
    corners = {draw(views, 0, position, 4, 4).box[:2] for position in range(300)}
    assert corners == {(left, top) for left in range(3) for top in range(3)}


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 1), (1, 700)])
def test_the_crop_falls_back_to_the_centre_as_torchvisions(size) -> None:
    width, height = size
    views = Views(crop_scale=(0.95, 1.0), crop_ratio=(0.9, 1.1))
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), list(views.crop_scale), list(views.crop_ratio))
    assert draw(views, 0, 3, width, height).box == (left, top, left + w, top + h)


def test_an_augmentation_is_a_pure_function_of_seed_and_position() -> None:
    views = Views()
    drawn = [draw(views, 1, position, 90, 70) for position in range(50)]
    assert drawn == [draw(views, 1, position, 90, 70) for position in range(50)]
    assert drawn != [draw(views, 2, position, 90, 70) for position in range(50)]
    assert len(set(drawn)) == 50


def test_flips_come_as_often_as_asked() -> None:
    flips = [draw(Views(flip=0.3), 0, position, 64, 64).flip for position in range(2000)]
    assert abs(np.mean(flips) - 0.3) < 4 * math.sqrt(0.21 / 2000)
    assert not any(draw(Views(flip=0.0), 0, position, 64, 64).flip for position in range(200))


def test_train_pixels_are_the_crop_resized_once_and_mirrored_after() -> None:
    image = picture("RGB", (90, 70))
    view = TowerView(PreprocessCfg(size=(16, 24)), ByteTokenizer(4)).train_pixels
    plain = train_pixels(image, Augmentation((5, 6, 75, 66), False), view, "pillow")
    expected = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC, box=(5, 6, 75, 66)))
    assert np.abs(plain.astype(int) - expected.transpose(2, 0, 1)).max() <= 1
    assert np.array_equal(train_pixels(image, Augmentation((5, 6, 75, 66), True), view, "pillow"), plain[:, :, ::-1])


def test_the_reducing_gap_moves_large_crops_little_and_small_ones_not_at_all() -> None:
    image, view = picture("RGB", (900, 800)), (32, 32, int(Image.Resampling.BICUBIC))
    for box, most, mean in (((0, 0, 900, 800), 8, 0.5), ((10, 10, 190, 190), 0, 0.0)):
        pixels = train_pixels(image, Augmentation(box, False), view, "pillow")
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, box=box)).transpose(2, 0, 1)
        difference = np.abs(pixels.astype(int) - expected)
        assert difference.max() <= most
        assert difference.mean() <= mean


def test_towers_are_equal_by_content() -> None:
    one, other = (TowerView(PreprocessCfg(size=224), open_clip.get_tokenizer("ViT-B-32")) for _ in range(2))
    one.tokenize(["words that fill the tokenizer's cache"])
    assert one == other
    assert hash(one) == hash(other)
    cut, other_cut = (dataclasses.replace(view, tokenize=ToLongest(view.tokenize, "argmax", 0)) for view in (one, other))
    assert cut.tokens == other_cut.tokens != one.tokens
    shifted = TowerView(PreprocessCfg(size=(224, 224), mean=(0.5, 0.5, 0.5)), one.tokenize)
    assert shifted != one
    assert shifted.train_pixels == one.train_pixels
    assert shifted.tokens == one.tokens
    assert TowerView(PreprocessCfg(size=224), ByteTokenizer(4)).tokens != TowerView(PreprocessCfg(size=224), ByteTokenizer(5)).tokens
    assert (
        TowerView(PreprocessCfg(size=224), lambda texts: torch.ones(1)).tokens
        != TowerView(PreprocessCfg(size=224), lambda texts: torch.zeros(1)).tokens
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bomb_png(40_000, 40_000), "too_large"),
        (bomb_png(1001, 1000), "too_large"),
        (jpeg(1)[:300], "corrupt_image"),
        (b"", "corrupt_image"),
        (b"P6 2 2 255 " + bytes(12), "corrupt_image"),  # PIL could, but no shard holds it: fewer decoders for strangers' bytes
        (bomb_png(10, 10), "corrupt_image"),
    ],
)
def test_undecodable_images_say_why(data, reason) -> None:
    with pytest.raises(BadSample) as caught:
        decode(data, 1_000_000)
    assert caught.value.reason == reason
