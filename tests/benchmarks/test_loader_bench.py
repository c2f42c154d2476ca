"""The loader's benchmark: what its photographs are, which rows there are, and what their verdicts go by."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from megakd.benchmarks import loader, loader_material
from megakd.benchmarks.common.comparison import THEIRS
from megakd.benchmarks.loader import Measured


@pytest.mark.parametrize("longer", loader_material.SIZES)
def test_photographs_have_their_size_and_bytes_a_pixel_as_photographs_have(longer: int) -> None:
    pictures = loader_material.shipped()
    made = [loader_material.photograph(np.random.default_rng(seed), pictures, longer) for seed in range(4)]
    for data in made:
        with Image.open(io.BytesIO(data)) as image:
            assert {max(image.size), min(image.size)} == {longer, longer * 3 // 4}
    bits = 8 * np.mean([len(data) for data in made]) / (longer * longer * 3 // 4)
    assert 1.2 < bits < 4


def test_sources_are_named_and_others_refused() -> None:
    assert loader_material.sources("1024, set,1024") == ["1024", "set"]
    with pytest.raises(ValueError, match=r"--sources 640: choose among set,256,512,1024"):
        loader_material.sources("256,640")


def test_scaled_decoding_has_a_row_where_a_crop_can_be_twice_the_towers() -> None:
    assert loader.sides("512", first=False) == [loader.DEFAULT, loader.TORCH, THEIRS]
    assert loader.sides("1024", first=False) == [loader.DEFAULT, loader.TORCH, loader.SCALED, THEIRS]


def test_a_verdict_goes_by_the_smaller_of_both_ratios_and_no_way_by_anothers_figures() -> None:
    measured = {
        loader.DEFAULT: Measured([12.0, 9.0, 10.0], [2.0, 2.2, 1.8]),
        loader.TORCH: Measured([16.0, 15.0, 17.0], [1.0, 1.4, 1.0]),
        THEIRS: Measured([10.0, 10.0, 9.0], [2.0, 1.9, 2.1]),
    }
    default, torch = loader.rows("512", measured)
    assert (default["ratio"], default["processor_ratio"], default["reached"]) == (1.0, 1.0, False)
    assert (torch["ratio"], torch["processor_ratio"], torch["reached"]) == (1.6, 2.0, True)
    measured[loader.TORCH].busy[:] = [1.4] * 3
    assert not loader.rows("512", measured)[1]["reached"]
