"""`[views]`: the values behind a preset's name, what may stand beside it, and what is refused."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import timm.data
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from pydantic import ValidationError
from torchvision.transforms import RandAugment, RandomErasing, RandomResizedCrop

from megakd.data.store.manifest import differences
from megakd.recipe import Views, load


def views(**given: Any) -> Views:
    return Views.model_validate(given)


def test_clip_is_what_open_clip_trains_with() -> None:
    ours, (crop, *others) = views(preset="clip"), image_transform_v2(PreprocessCfg(), is_train=True).transforms
    assert (ours.crop_scale, ours.crop_ratio) == (tuple(crop.scale), pytest.approx(tuple(crop.ratio)))
    assert ours.crop_scale == AugmentationCfg().scale
    assert [type(other).__name__ for other in others] == ["MaybeConvertMode", "MaybeToTensor", "Normalize"]
    assert (ours.flip, ours.operations()) == (0.0, [])
    assert open_clip.__version__.startswith("3.")


def test_mobileclip_is_torchvisions_defaults_of_crop_and_rand_augment() -> None:
    """Its configuration names the two transforms, a probability of 1 and nothing else."""
    ours, crop, rand = views(preset="mobileclip"), RandomResizedCrop(224), RandAugment()
    assert (ours.crop_scale, ours.crop_ratio, ours.flip) == (crop.scale, crop.ratio, 0.0)
    assert ours.operations() == ["rand_augment"]
    assert ours.rand_augment is not None
    assert (ours.rand_augment.layers, ours.rand_augment.magnitude) == (rand.num_ops, rand.magnitude)
    assert (ours.rand_augment.std, ours.rand_augment.probability) == (0.0, 1.0)
    assert (ours.rand_augment.interpolation, rand.fill, ours.rand_augment.fill) == (rand.interpolation.value, None, (0, 0, 0))
    assert rand.num_magnitude_bins == 31


def test_timm_is_what_its_factory_makes_of_deits_flags() -> None:
    deit = {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "re_prob": 0.25, "re_mode": "pixel", "interpolation": "bicubic"}
    crop, flip, rand, *rest = timm.data.create_transform(224, is_training=True, **deit).transforms
    erase, ours = rest[-1], views(preset="timm")
    assert "ColorJitter" not in [type(one).__name__ for one in rest]
    assert (ours.crop_scale, ours.crop_ratio, ours.flip) == (crop.scale, crop.ratio, flip.p)
    assert ours.rand_augment is not None
    assert ours.rand_augment.layers == rand.num_layers
    for operation in rand.ops:
        magnitude, std = 3 * operation.magnitude, 3 * operation.magnitude_std  # to 30 here, to 10 there
        assert (ours.rand_augment.magnitude, ours.rand_augment.std, ours.rand_augment.probability) == (magnitude, std, operation.prob)
        assert ours.rand_augment.fill == operation.hparams["img_mean"]
    assert ours.erase is not None
    assert (ours.erase.probability, ours.erase.scale) == (erase.probability, (erase.min_area, erase.max_area))
    assert erase.per_pixel
    assert ours.erase.value == "noise"


def test_the_defaults_are_torchvisions() -> None:
    erase, erased = RandomErasing(), views(erase={"probability": 0.5}).erase
    assert erased is not None
    assert (erased.scale, erased.ratio, erased.value) == (erase.scale, erase.ratio, (0, 0, 0))


def test_keys_beside_a_preset_are_kept_and_its_tables_filled() -> None:
    mine = views(preset="timm", flip=0.0, rand_augment={"layers": 3}, color_jitter={"hue": 0.1})
    assert mine.rand_augment is not None
    assert (mine.flip, mine.rand_augment.layers, mine.rand_augment.magnitude, mine.crop_scale) == (0.0, 3, 27.0, (0.08, 1.0))
    assert mine.operations() == ["rand_augment", "color_jitter", "erase"]


def test_a_preset_stands_for_its_values() -> None:
    preset = views(preset="mobileclip")
    assert preset == views(crop_scale=[0.08, 1.0], flip=0.0, rand_augment={"magnitude": 9})
    assert Views.model_validate(preset.model_dump(mode="json")) == preset
    with pytest.raises(ValidationError, match="preset = 'timm' would change nothing, as every key is given beside it"):
        Views.model_validate({**preset.model_dump(mode="json"), "preset": "timm"})


def test_no_preset_is_the_augmentation_of_before() -> None:
    assert views() == views(crop_scale=[0.5, 1.0], crop_ratio=[0.75, 4 / 3], flip=0.5)
    assert views().policy() == {"crop_scale": [0.5, 1.0], "crop_ratio": [0.75, 4 / 3], "flip": 0.5}


@pytest.mark.parametrize("key", ["rand_augment", "erase"])
def test_probability_0_takes_an_operation_of_a_preset_out(key: str) -> None:
    without = views(preset="timm", **{key: {"probability": 0}})
    assert key not in without.operations()
    assert len(without.operations()) == 1
    assert key not in without.policy()
    assert views(grayscale=0).operations() == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "mine"}, "preset\n  Input should be 'clip', 'mobileclip' or 'timm'"),
        ({"preset": ["clip"]}, "preset\n  Input should be"),
        ({"rand_augment": {"std": 0.5}}, "rand_augment.magnitude\n  Field required"),
        ({"rand_augment": {"magnitude": 31}}, "rand_augment.magnitude\n  Input should be less than or equal to 30"),
        ({"rand_augment": {"magnitude": 9, "layers": 11}}, "rand_augment.layers"),
        ({"rand_augment": {"magnitude": 9, "fill": [0, 0, 256]}}, "rand_augment.fill"),
        ({"color_jitter": {"brightness": 1.5}}, "color_jitter.brightness\n  Input should be less than or equal to 1"),
        ({"color_jitter": {"hue": 0.6}}, "color_jitter.hue\n  Input should be less than or equal to 0.5"),
        ({"color_jitter": {"probability": 0.5}}, "are all 0, which changes nothing"),
        ({"grayscale": 1.1}, "grayscale"),
        ({"blur": {}}, "blur.probability\n  Field required"),
        ({"blur": {"probability": 1.0, "sigma": [2.0, 1.0]}}, r"sigma = \[2.0, 1.0\]: give two numbers"),
        ({"blur": {"probability": 1.0, "sigma": [0.0, 1.0]}}, r"sigma = \[0.0, 1.0\]: give two numbers"),
        ({"erase": {"probability": 1.0, "scale": [0.5, 1.0]}}, "1 would leave no picture"),
        ({"erase": {"probability": 1.0, "ratio": [3.0, 0.3]}}, "give two ratios"),
        ({"erase": {"probability": 1.0, "value": "red"}}, r"erase.value\n  Value error, 'noise', or a colour"),
        ({"erase": {"probability": 1.0, "value": [0, 0, 300]}}, r"erase.value\n  Value error, 'noise', or a colour"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_key(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Views.model_validate(given)


def test_a_store_of_another_policy_is_told_key_by_key() -> None:
    before = {"views": {"crop_scale": [0.5, 1.0], "crop_ratio": [0.75, 4 / 3], "flip": 0.5}}  # as stores of older versions have it
    assert differences(before, {"views": views().policy()}) == []
    lines = differences(before, {"views": views(rand_augment={"magnitude": 9}, grayscale=0.2).policy()})
    assert "views.grayscale: None in the store, 0.2 in the recipe" in lines
    assert "views.rand_augment.magnitude: None in the store, 9.0 in the recipe" in lines
    mine, theirs = ({"views": views(erase={"probability": 0.5, "value": value}).policy()} for value in ("noise", [1, 2, 3]))
    assert differences(mine, theirs) == ["views.erase.value: 'noise' in the store, [1, 2, 3] in the recipe"]


def test_a_run_goes_on_with_the_values_of_its_preset_and_with_no_others() -> None:
    smoke = ("views.crop_scale=[0.08, 1.0]", "views.flip=0.0")
    old = load.load("smoke", ["views.preset=mobileclip"])[0]
    assert old.views.crop_scale == (1.0, 1.0)  # smoke's own
    same = load.load("smoke", ["views.rand_augment.magnitude=9"])[0]
    assert load.refused(old, same) == []
    assert load.differences(old, same) == []
    other = load.load("smoke", [*smoke, "views.rand_augment.magnitude=5", "views.rand_augment.std=1"])[0]
    assert "views.rand_augment.magnitude: 9.0 -> 5.0" in load.refused(old, other)
    assert any(
        line.startswith("views.rand_augment: ") or "views.rand_augment.layers" in line for line in load.refused(old, load.load("smoke")[0])
    )


def test_operations_without_pairs_to_learn_from_are_refused() -> None:
    with pytest.raises(ValueError, match=r"views.grayscale: no objective learns from pairs"):
        load.load("vqa_align", ["views.grayscale=0.1"])
