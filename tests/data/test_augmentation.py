"""The operations after the crop: each torchvision's own, drawn as asked, and the same for every tower, rank, worker and store."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import Grayscale, InterpolationMode, RandomErasing, v2
from torchvision.transforms.autoaugment import _apply_op

from megakd.data.augmentation import OPERATIONS, RAND_AUGMENT, Augmentation, Erasure, Operation, altered, draw, draw_stored
from megakd.data.pictures import train_pixels
from megakd.data.shards import ShardSet
from megakd.data.store.reader import Store
from megakd.data.store.views import StoredViews
from megakd.data.transforms import decode
from megakd.recipe import Views
from support.loaders import TOWERS, take
from support.stores import write

EVERYTHING = Views.model_validate(
    {
        "rand_augment": {"magnitude": 9, "layers": 3, "std": 4.0, "interpolation": "bilinear", "fill": [9, 90, 200]},
        "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "probability": 0.7},
        "grayscale": 0.2,
        "blur": {"probability": 0.5},
        "erase": {"probability": 0.5, "value": "noise"},
    }
)
MANY = 2000


def picture(height: int, width: int) -> Image.Image:
    generator = np.random.default_rng(height)
    return Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def changed(image: Image.Image, *operations: Operation, **more: object) -> np.ndarray:
    return altered(image, Augmentation((0, 0, 1, 1), False, operations, **more))  # type: ignore[arg-type]


def drawn(views: Views, count: int = MANY) -> list[Augmentation]:
    return [draw(views, 4, position, 60, 50) for position in range(count)]


def share(found: int, of: int, expected: float) -> bool:
    return abs(found / of - expected) < 4 * math.sqrt(expected * (1 - expected) / of)


@pytest.mark.parametrize("magnitude", [0, 9, 27, 30])
@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
def test_each_of_rand_augments_operations_is_torchvisions(magnitude: int, interpolation: str) -> None:
    """Strengths and pixels, on a picture that is no square."""
    image = picture(40, 56)
    settings = {"magnitude": magnitude, "layers": 1, "interpolation": interpolation, "fill": [10, 20, 30]}
    theirs = v2.RandAugment(magnitude=magnitude)._AUGMENTATION_SPACE
    assert tuple(theirs) == RAND_AUGMENT
    found = {augmentation.operations[0] for augmentation in drawn(Views.model_validate({"rand_augment": settings}), 400)}
    assert {operation.name for operation in found} == set(theirs)
    for operation in found:
        levels, signed = theirs[operation.name]
        magnitudes = levels(31, 40, 56)
        theirs_is = 0.0 if magnitudes is None else float(magnitudes[magnitude])
        ours_is = operation.strength * {"TranslateX": 56, "TranslateY": 40, "Solarize": 1 / 255}.get(operation.name, 1)
        assert abs(ours_is) == pytest.approx(theirs_is, abs=1e-5)
        assert signed or ours_is >= 0
        mode = InterpolationMode(interpolation)
        expected = _apply_op(image, operation.name, ours_is * (255 if operation.name == "Solarize" else 1), mode, [10, 20, 30])
        ours = changed(image, operation, interpolation=mode, fill=(10, 20, 30))
        assert np.array_equal(ours, np.asarray(expected)), operation
    names = [operation.name for operation in found]
    assert magnitude == 0 or all(names.count(name) == (2 if signed else 1) for name, (_, signed) in theirs.items())


def test_colour_jitter_is_torchvisions_in_each_order() -> None:
    image, keys = picture(32, 32), ["Brightness", "Contrast", "Color", "Hue"]
    views = Views.model_validate({"color_jitter": {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}})
    orders = set()
    for augmentation in drawn(views, 150):
        strengths = {operation.name: operation.strength for operation in augmentation.operations}
        order = [keys.index(operation.name) for operation in augmentation.operations]
        orders.add(tuple(order))
        names = ("brightness_factor", "contrast_factor", "saturation_factor")
        factors = {name: 1 + strengths[key] for name, key in zip(names, keys, strict=False)}
        params = {"fn_idx": torch.tensor(order), **factors, "hue_factor": strengths["Hue"]}
        expected = v2.ColorJitter(0.4, 0.3, 0.2, 0.1).transform(image, params)
        assert np.array_equal(changed(image, *augmentation.operations), np.asarray(expected))
    assert len(orders) == 24
    ranges = {"Brightness": 0.4, "Contrast": 0.3, "Color": 0.2, "Hue": 0.1}
    found = [operation for augmentation in drawn(views) for operation in augmentation.operations]
    for name, most in ranges.items():
        strengths_of = [operation.strength for operation in found if operation.name == name]
        assert stats.kstest(strengths_of, stats.uniform(-most, 2 * most).cdf).pvalue > 1e-3


def test_what_has_no_range_is_left_out_of_a_jitter() -> None:
    views = Views.model_validate({"color_jitter": {"saturation": 1.0, "probability": 0.25}})
    found = [augmentation.operations for augmentation in drawn(views)]
    assert {operation.name for operations in found for operation in operations} == {"Color"}
    assert share(sum(len(operations) for operations in found), MANY, 0.25)


def test_grey_is_torchvisions_and_comes_as_often_as_asked() -> None:
    image = picture(32, 32)
    assert np.array_equal(changed(image, Operation("Grayscale")), np.asarray(Grayscale(3)(image)))
    assert share(sum(bool(augmentation.operations) for augmentation in drawn(Views(grayscale=0.2))), MANY, 0.2)


def test_blur_is_torchvisions_with_a_sigma_of_the_towers_size() -> None:
    views = Views.model_validate({"blur": {"probability": 0.5, "sigma": [0.5, 2.0]}})
    sigmas = [operation.strength * 224 for augmentation in drawn(views) for operation in augmentation.operations]
    assert share(len(sigmas), MANY, 0.5)
    assert stats.kstest(sigmas, stats.uniform(0.5, 1.5).cdf).pvalue > 1e-3
    for height, kernel in ((224, 13), (112, 7)):  # sigma 2 and 1, on which the kernel reaches three
        image = picture(height, height)
        sigma = 2.0 * height / 224
        expected = v2.GaussianBlur(kernel, (sigma, sigma))(image)
        assert np.array_equal(changed(image, Operation("Blur", 2 / 224)), np.asarray(expected))
    assert changed(picture(8, 8), Operation("Blur", 20 / 224)).shape == (8, 8, 3)
    assert changed(picture(4, 3), Operation("Blur", 1.0)).shape == (4, 3, 3)


def test_rectangles_are_distributed_as_torchvisions() -> None:
    """Of a square tower: as often, where and how large; filled with the colour, and nothing else changed."""
    views = Views.model_validate({"erase": {"probability": 0.6, "scale": [0.02, 0.4], "ratio": [0.3, 3.3], "value": [1, 2, 3]}})
    white, ours = Image.new("RGB", (64, 64), "white"), []
    for augmentation in drawn(views):
        gone = (altered(white, augmentation) == (1, 2, 3)).all(axis=2)
        if augmentation.erasure is None:
            assert not gone.any()
            continue
        rows, columns = np.flatnonzero(gone.any(axis=1)), np.flatnonzero(gone.any(axis=0))
        ours.append((rows[0], columns[0], len(rows), len(columns)))
        assert gone.sum() == len(rows) * len(columns)
    assert share(len(ours), MANY, 0.6)
    torch.manual_seed(0)
    theirs = [RandomErasing.get_params(torch.zeros(3, 64, 64), (0.02, 0.4), (0.3, 3.3), [0.0])[:4] for _ in range(MANY)]
    for column in range(4):
        assert stats.ks_2samp(np.array(ours)[:, column], np.array(theirs)[:, column]).pvalue > 1e-3, ["top", "left", "height", "width"][
            column
        ]


def test_noise_is_bytes_drawn_evenly_from_its_key_and_a_rectangle_never_is_the_picture() -> None:
    black = Image.new("RGB", (48, 40))
    for key in (5, 6):
        first, again = (changed(black, erasure=Erasure(0.999, 0.999, 0.0, 0.4, key)) for _ in range(2))
        assert np.array_equal(first, again)
        assert not first[39].any()
        assert not first[:, 47].any()
        assert stats.chisquare(np.bincount(first[:39, :47].ravel(), minlength=256)).pvalue > 1e-3
    assert not np.array_equal(first, changed(black, erasure=Erasure(0.999, 0.999, 0.0, 0.4, 5)))
    keys = [one.erasure.value for one in drawn(EVERYTHING, 200) if one.erasure is not None]
    assert len(set(keys)) == len(keys) > 50


def test_layers_and_magnitudes_come_as_asked() -> None:
    views = Views.model_validate({"rand_augment": {"magnitude": 27, "layers": 2, "std": 3.0, "probability": 0.3}})
    found = [augmentation.operations for augmentation in drawn(views, 3 * MANY)]
    counts = np.bincount([len(operations) for operations in found], minlength=3)
    assert all(share(count, len(found), expected) for count, expected in zip(counts, (0.49, 0.42, 0.09), strict=True))
    operations = [operation for both in found for operation in both]
    assert stats.chisquare(np.bincount([RAND_AUGMENT.index(operation.name) for operation in operations])).pvalue > 1e-3
    magnitudes = np.array([abs(operation.strength) for operation in operations if operation.name == "Rotate"])
    normal = np.clip(np.random.default_rng(0).normal(27, 3, 20_000), 0, 30)
    assert (magnitudes == 30).any()
    assert stats.ks_2samp(magnitudes, normal).pvalue > 1e-3


def test_an_operation_more_changes_no_draw_of_the_others() -> None:
    plain, all_of_them = drawn(Views(), 200), drawn(EVERYTHING, 200)
    assert [(one.box, one.flip) for one in plain] == [(one.box, one.flip) for one in all_of_them]
    alone = drawn(Views(rand_augment=EVERYTHING.rand_augment), 200)
    assert all(one.operations[:3] == many.operations[:3] for one, many in zip(alone, all_of_them, strict=True))
    assert [one.erasure for one in drawn(Views(erase=EVERYTHING.erase), 200)] == [one.erasure for one in all_of_them]


def test_without_operations_crops_are_what_they_were_before_there_were_any() -> None:
    assert drawn_before == [draw(Views(), 7, position, 90, 70) for position in range(3)]
    assert stored_before == [draw_stored(Views(), 7, 5, view, 90, 70) for view in range(2)]


drawn_before = [Augmentation((15, 11, 79, 69), True), Augmentation((20, 1, 89, 67), False), Augmentation((0, 2, 81, 63), False)]
stored_before = [Augmentation((21, 0, 82, 65), True), Augmentation((31, 5, 84, 70), True)]


def test_nobodys_random_state_is_asked_or_moved() -> None:
    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]

    image, before = picture(50, 60), states()
    seen = [train_pixels(image, augmentation, TOWERS["student"].train_pixels, "pillow") for augmentation in drawn(EVERYTHING, 40)]
    assert states() == before
    torch.manual_seed(99)
    random.seed(99)
    again = [train_pixels(image, augmentation, TOWERS["student"].train_pixels, "pillow") for augmentation in drawn(EVERYTHING, 40)]
    assert all(np.array_equal(one, other) for one, other in zip(seen, again, strict=True))


def test_the_flip_comes_before_the_operations() -> None:
    image, shift = picture(16, 16), (Operation("TranslateX", 0.25),)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    view = (16, 16, int(Image.Resampling.BICUBIC))
    found = train_pixels(image, Augmentation((0, 0, 16, 16), True, shift), view, "pillow")
    assert np.array_equal(found.transpose(1, 2, 0), changed(mirrored, *shift))
    assert not found[:, :, :4].any()


def test_towers_of_other_sizes_get_the_same_augmentation(clean: ShardSet) -> None:
    """Each batch's pixels are those of one augmentation a sample, at the tower's own size."""
    for batch in take(clean, 3, views=EVERYTHING):
        for row, index in enumerate(batch.index.tolist()):
            image = decode(clean.read(index, ("image",)).members["image"], 10**7).convert("RGB")
            augmentation = draw(EVERYTHING, 3, batch.position + row, *image.size)
            for name, tower in TOWERS.items():
                expected = train_pixels(image, augmentation, tower.train_pixels, "pillow")
                assert torch.equal(batch.pixels[name][row], torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("operation", [("Rotate", 20.0), ("TranslateX", 0.3), ("ShearY", 0.2), ("Blur", 4 / 224), ("Color", 0.8)])
def test_an_operation_looks_alike_at_every_size(operation: tuple[str, float]) -> None:
    large, small = picture(96, 96), picture(96, 96).resize((48, 48), Image.Resampling.BILINEAR)
    how = {"interpolation": InterpolationMode.BILINEAR, "erasure": Erasure(0.4, 0.3, 0.2, 0.9, (0, 0, 0))}
    shrunk = Image.fromarray(changed(large, Operation(*operation), **how)).resize((48, 48), Image.Resampling.BILINEAR)
    difference = np.abs(np.asarray(shrunk).astype(int) - changed(small, Operation(*operation), **how))
    assert difference.mean() < 4


@pytest.mark.parametrize(("world", "workers"), [(2, 1), (4, 0)])
def test_any_number_of_ranks_and_workers_and_any_start_gives_the_same_pixels(clean: ShardSet, world: int, workers: int) -> None:
    whole = take(clean, 7, views=EVERYTHING)
    parts = [take(clean, 7, views=EVERYTHING, rank=rank, world=world, workers=workers) for rank in range(world)]
    for step, expected in enumerate(whole):
        for name in TOWERS:
            assert torch.equal(torch.cat([part[step].pixels[name] for part in parts]), expected.pixels[name])
    (later,) = take(clean, 1, views=EVERYTHING, start=whole[5].position)
    assert torch.equal(later.pixels["student"], whole[5].pixels["student"])


def test_a_store_was_made_of_the_pixels_that_a_run_replays(clean: ShardSet, tmp_path: Path) -> None:
    store = Store.open(write(tmp_path / "store"))
    source = StoredViews(clean, EVERYTHING, store.manifest.seed, TOWERS["teacher"])
    altered_rows = 0
    for batch, plain in zip(take(clean, 7, store=store, views=EVERYTHING), take(clean, 7, store=store), strict=True):
        assert batch.view is not None
        pixels, _ = source.see_all(batch.index.numpy(), batch.view.numpy())
        assert torch.equal(pixels, batch.pixels["teacher"])
        altered_rows += int((batch.pixels["teacher"] != plain.pixels["teacher"]).flatten(1).any(dim=1).sum())
    assert altered_rows > 50


def test_every_operation_keeps_the_size_and_the_type() -> None:
    for name in OPERATIONS:
        pixels = changed(picture(12, 20), Operation(name, 7 if name == "Posterize" else 0.1))
        assert (pixels.shape, pixels.dtype) == ((12, 20, 3), np.uint8)
