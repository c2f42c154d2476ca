"""Outliers of activations in 8 bits: what they cost, what each remedy keeps, and what a comparison at start says of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models import streaming
from megakd.models.int8.agreement import Agreement, agreement
from megakd.models.int8.convert import quantise
from megakd.models.int8.linear import Int8Linear, quantise_weight
from megakd.models.int8.migration import Originals, Reference, factors, migrate
from megakd.models.weights import InMemory
from megakd.runtime.launch import World
from megakd.runtime.zero3 import overwrite
from megakd.teachers.replicated import ReplicatedTeacher
from support.outlier_teachers import ARCHITECTURES, build, description, inputs

ALONE = World(0, 1, torch.device("cpu"))
PAIRS, SCALE = 48, 100.0
Embedded = tuple[Tensor, Tensor]


def _embedded(clip: nn.Module, batch: Embedded) -> Embedded:
    with torch.no_grad():
        return F.normalize(clip.encode_image(batch[0]), dim=-1), F.normalize(clip.encode_text(batch[1]), dim=-1)


def _agreement(found: Embedded, expected: Embedded) -> Agreement:
    return agreement(found[0], expected[0], found[1], expected[1], SCALE)


class Grown:
    """A teacher with outliers in a file, what it gives in float32, and what it gives in 8 bits by each way."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.file = name, folder / f"{len(list(folder.iterdir()))}.safetensors"
        self.clip, self.batch = build(name), inputs(PAIRS)
        save_file({key: value.contiguous() for key, value in self.clip.state_dict().items()}, self.file)
        self.exact = _embedded(self.clip, self.batch)

    def int8(self, **settings: object) -> Agreement:
        converted = copy.deepcopy(self.clip)
        quantise(converted, **settings)
        return _agreement(_embedded(converted, self.batch), self.exact)

    def loaded(self, **settings: object) -> ReplicatedTeacher:
        settings = {"product": "int_mm", **settings}
        built = streaming.load(description(self.name, str(self.file)), ALONE, "fp32", int8=streaming.Int8(**settings))
        return ReplicatedTeacher(built)

    def calibrated(self, pairs: int = 16, **settings: object) -> ReplicatedTeacher:
        teacher = self.loaded(migrated=True, **settings)
        with Reference(teacher.towers.originals) as reference:
            reference.noting = True
            teacher.embed(*inputs(pairs, seed=1))
        migrate(teacher.towers.originals, reference.largest, overwrite)
        return teacher


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Grown]:
    folder, made = tmp_path_factory.mktemp("outliers"), {}

    def get(name: str) -> Grown:
        if name not in made:
            made[name] = Grown(name, folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outliers_change_nothing_in_float_and_cost_8_bits_a_third_of_the_nearest_texts(name: str, grown: Callable[[str], Grown]) -> None:
    teacher = grown(name)
    without = _embedded(build(name, grown=False), teacher.batch)
    assert _agreement(teacher.exact, without).worst_cosine > 1 - 1e-6
    lost = teacher.int8(product="int_mm")
    assert lost.centred < 0.97
    assert lost.top1 < 0.75
    plain = copy.deepcopy(build(name, grown=False))
    quantise(plain, product="int_mm")
    assert _agreement(_embedded(plain, teacher.batch), without).centred > 0.999


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_threshold_and_dequantising_keep_most_and_the_migration_all(name: str, grown: Callable[[str], Grown]) -> None:
    teacher = grown(name)
    assert teacher.int8(product="int_mm", threshold=6.0).centred > 0.995
    assert teacher.int8(product="dequantise").centred > 0.995
    found = teacher.calibrated().embed(*teacher.batch)
    kept = _agreement((found.image, found.text), teacher.exact)
    assert kept.centred > 0.999
    assert kept.divergence < teacher.int8(product="dequantise").divergence


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_its_original_matrices_it_is_the_16_bit_teacher(name: str, grown: Callable[[str], Grown]) -> None:
    teacher = grown(name)
    loaded = teacher.loaded()
    before = loaded.embed(*teacher.batch)
    with Reference(loaded.towers.originals):
        found = loaded.embed(*teacher.batch)
    torch.testing.assert_close(found.image, teacher.exact[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.text, teacher.exact[1], atol=1e-6, rtol=1e-5)
    assert torch.equal(loaded.embed(*teacher.batch).image, before.image), "the layers are what they were"


def test_a_migration_is_the_same_at_every_start_and_from_pieces_of_a_batch(grown: Callable[[str], Grown]) -> None:
    teacher = grown("open_clip's ViT")
    batch = inputs(16, seed=1)
    digests = []
    for size in (16, 16, 5):
        loaded = teacher.loaded(migrated=True)
        with Reference(loaded.towers.originals) as reference:
            reference.noting = True
            for start in range(0, 16, size):
                loaded.embed(batch[0][start : start + size], batch[1][start : start + size])
        digests.append(migrate(loaded.towers.originals, reference.largest, overwrite))
    assert digests[0] == digests[1] == digests[2]


def test_random_weights_are_drawn_again_as_they_were() -> None:
    torch.manual_seed(3)
    loaded = streaming.load(description("EVA", "random"), ALONE, "fp32", int8=streaming.Int8())
    after = torch.rand(1)
    for _ in range(2):  # what is still there, then drawn anew
        for layer in loaded.originals.names:
            codes, scale = quantise_weight(loaded.originals.read(layer))
            assert torch.equal(codes, layer.weight)
            assert torch.equal(scale, layer.scale)
        loaded.originals.close()
    torch.manual_seed(3)
    streaming.load(description("EVA", "random"), ALONE, "fp32")
    assert torch.equal(torch.rand(1), after)


def _one(weight_OI: Tensor, **settings: object) -> tuple[Int8Linear, Originals]:
    layer = Int8Linear(weight_OI, None, migrated=True, **settings)
    return layer, Originals({layer: "weight"}, lambda: InMemory({"weight": weight_OI}, "a test"), ALONE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_powers_of_two_that_divide_activations_exactly(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 96, generator=generator), torch.randn(40, 96, generator=generator)
    x[:, 7] *= 50
    x = x.to(dtype)
    layer, originals = _one(weight, product="int_mm")
    with Reference(originals) as reference:
        reference.noting = True
        exact = layer(x)
    torch.testing.assert_close(exact, F.linear(x, weight.to(dtype)))
    migrate(originals, reference.largest, overwrite)
    assert torch.equal(layer.factor.log2(), layer.factor.log2().round())
    assert layer.factor[7] == layer.factor.max() > 2
    narrow = layer.to(torch.bfloat16).factor
    assert torch.equal((x / narrow.to(dtype)) * narrow.to(dtype), x)
    error = (layer(x) - F.linear(x, weight.to(dtype))).norm() / exact.norm()
    plain = (Int8Linear(weight, None, product="int_mm")(x) - exact).norm() / exact.norm()
    assert error < 0.5 * plain or dtype == torch.bfloat16


def test_channels_that_say_nothing_have_a_factor_of_one() -> None:
    nan, inf = float("nan"), float("inf")
    found = factors(torch.tensor([1.0, 0.0, 1.0, nan, inf, 1e9]), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0]))
    assert found[1:5].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert found.isfinite().all()
    assert factors(torch.zeros(3), torch.ones(3)).tolist() == [1.0, 1.0, 1.0]


def test_a_quiet_channel_is_not_made_loud() -> None:
    """It may be loud in the next batch: at most four times as large."""
    found = factors(torch.tensor([1e-12, 1.0, 1.0]), torch.ones(3))
    assert found.min() == 0.25


def test_an_agreement_counts_what_tells_samples_apart() -> None:
    rows = F.normalize(torch.tensor([[10.0, 1.0, 0.0], [10.0, -1.0, 0.0], [10.0, 0.0, 1.0], [10.0, 0.0, -1.0]]), dim=1)
    same = agreement(rows, rows, rows, rows, 50.0)
    assert (same.cosine, same.centred, same.top1, same.divergence) == pytest.approx((1.0, 1.0, 1.0, 0.0))
    swapped = agreement(rows[[1, 0, 3, 2]], rows, rows, rows, 50.0)
    assert swapped.cosine > 0.97
    assert swapped.centred == pytest.approx(-1.0)
    assert swapped.top1 == 0.0
    assert agreement(rows, rows, None, None, 1.0).top1 is None
    alike = rows[:1].repeat(3, 1)
    assert agreement(alike, alike, alike, alike, 50.0).centred == pytest.approx(1.0)
    assert not agreement(rows * float("nan"), rows, rows, rows, 50.0).centred > 0
    assert not agreement(rows, rows * float("nan"), rows, rows, 50.0).centred > 0
