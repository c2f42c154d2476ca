"""A mixture: shares of every batch, a shuffle and epochs of each source, the same for any ranks, workers and starts."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megakd.cli import app
from megakd.data.mixture import MixtureOrder, Source, order_of_pairs, outline
from megakd.data.pairs import Batch
from megakd.data.sampler import Order
from megakd.data.shards import ShardSet
from support.loaders import BATCH, order_of, stream, take
from support.shards import bomb_png, open_shards, pair, text_of, write_set, write_tar

pytestmark = pytest.mark.usefixtures("no_process_is_left")
# A checkpoint holds the position alone, which has to mean the same sample for ever.
PINNED = [963, 1073, 1017, 540, 871, 1021, 1028, 872, 1014, 1013, 969, 970]
ORDERS = st.builds(
    lambda sizes, batch, seed: MixtureOrder(
        tuple(Source(f"s{number}", size, weight) for number, (size, weight) in enumerate(sizes)), batch, seed, 4, 3
    ),
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.001, 9.0)), min_size=1, max_size=5),
    st.integers(1, 40),
    st.integers(0, 2**40),
)


def sources(order: MixtureOrder, indices: np.ndarray[Any, Any]) -> list[int]:
    return np.bincount(order.sources_of(indices), minlength=len(order.sources)).tolist()


@settings(max_examples=20, deadline=None)
@given(ORDERS)
def test_each_batch_has_its_share_of_each_source_and_counts_say_how_many_came_before(order: MixtureOrder) -> None:
    before = [0] * len(order.sources)
    for number in range(20):
        assert order.counts(number) == before
        found = sources(order, order.indices(number * order.batch, order.batch))
        for count, share in zip(found, order.shares, strict=True):
            assert abs(count - share * order.batch) < 1 + 1e-9
        before = [one + more for one, more in zip(before, found, strict=True)]


@settings(max_examples=20, deadline=None)
@given(ORDERS, st.integers(0, 2**40))
def test_over_any_number_of_batches_shares_are_the_weights_to_a_few_rows(order: MixtureOrder, batches: int) -> None:
    total = sum(Fraction(source.weight) for source in order.sources)
    for count, source in zip(order.counts(batches), order.sources, strict=True):
        # The discrepancy of van der Corput's sequence is below log2(n) / 3 + 1, and a source has two ends.
        assert abs(count - Fraction(source.weight) / total * order.batch * batches) < 2 * (40 / 3 + 1) + Fraction(batches, 2**31)


@settings(max_examples=20, deadline=None)
@given(ORDERS, st.data())
def test_a_slice_is_the_same_whatever_was_asked_before(order: MixtureOrder, data: st.DataObject) -> None:
    whole = order.indices(0, 300)
    start = data.draw(st.integers(0, 299))
    count = data.draw(st.integers(0, 300 - start))
    assert np.array_equal(order.indices(start, count), whole[start : start + count])
    assert order(start) == whole[start]


def test_each_epoch_of_a_source_has_each_of_its_samples_once_and_begins_where_it_runs_out() -> None:
    order = MixtureOrder((Source("large", 500, 3), Source("small", 23, 1)), 16, 7, 4, 3)
    indices = order.indices(0, 16 * 60)
    small = indices[indices >= 500]
    assert len(small) == 4 * 60
    epochs = [small[start : start + 23] for start in range(0, 23 * 10, 23)]
    assert all(sorted(epoch) == list(range(500, 523)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10  # each in an order of its own
    assert [order.epoch(position) for position in np.flatnonzero(indices >= 500)] == [place // 23 for place in range(len(small))]
    large = indices[indices < 500]
    assert len(set(large[:500].tolist())) == 500


def test_a_sources_shuffle_is_its_own_by_seed_and_name() -> None:
    def drawn(seed: int, *named: tuple[str, int, float]) -> list[list[int]]:
        order = MixtureOrder(tuple(Source(*one) for one in named), 8, seed, 4, 3)
        starts = [0, *itertools.accumulate(source.samples for source in order.sources)]
        indices = order.indices(0, 8 * 200)
        found = order.sources_of(indices)
        return [(indices[found == number] - starts[number])[:90].tolist() for number in range(len(named))]

    a, b = drawn(1, ("a", 100, 1), ("b", 100, 1))
    assert a != b
    assert drawn(1, ("c", 30, 2), ("b", 100, 1), ("a", 100, 5))[1:] == [b, a]  # beside another source and at other weights
    assert drawn(2, ("a", 100, 1), ("b", 100, 1))[0] != a


def test_no_row_of_a_batch_has_always_the_same_source() -> None:
    order = MixtureOrder((Source("a", 100, 1), Source("b", 100, 1)), 4, 0, 4, 3)
    found = order.sources_of(order.indices(0, 4 * 400)).reshape(400, 4)
    assert np.all(np.abs(found.mean(0) - 0.5) < 0.1)
    assert np.all(found.sum(1) == 2)


def test_the_order_of_a_seed_never_changes() -> None:
    order = MixtureOrder((Source("a", 1000, 1.5), Source("b", 77, 2)), 12, 7, 16, 4)
    assert order.indices(12 * 1000, 12).tolist() == PINNED


def test_a_weight_of_0_draws_nothing_and_a_table_of_sizes_is_in_proportion() -> None:
    order = MixtureOrder((Source("a", 50, 0.0), Source("b", 50, 1.0)), 8, 0, 4, 3)
    assert order.counts(10) == [0, 80]
    assert min(order.indices(0, 80)) == 50
    assert "none of which is drawn" in outline(order, "data.train", "pairs", 10)[0]


def test_without_names_it_is_the_plain_order() -> None:
    assert order_of_pairs(100, (), 8, 3, 4, 3) == Order(100, 8, 3, 4, 3)


def test_what_is_twice_in_each_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.train\.few: 3 samples, .* 0\.5 of all, optim\.batch = 8 takes 4 of them at once"):
        order_of_pairs(103, (Source("many", 100, 1), Source("few", 3, 1)), 8, 0, 4, 3)


def table(folder: Path, **weights: float | None) -> dict[str, Any]:
    """Sources of 40, 20 and 12 pairs, whose captions differ."""
    found: dict[str, Any] = {}
    for (name, weight), (first, count) in zip(weights.items(), ((0, 40), (100, 20), (200, 12)), strict=False):
        numbers = range(first, first + count)
        write_tar(folder / f"{name}.tar", [member for number in numbers for member in pair(f"{number:06d}", number)])
        found[name] = {"shards": str(folder / f"{name}.tar"), **({} if weight is None else {"weight": weight})}
    return found


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return open_shards(table(tmp_path_factory.mktemp("mixed"), a=2.0, b=1.0, c=1.0))


def contents(batches: list[list[Batch]]) -> list[tuple[object, ...]]:
    """Of global batches, each as its ranks' parts."""
    return [
        (
            torch.cat([part.index for part in parts]).tolist(),
            torch.cat([part.pixels["student"] for part in parts]).numpy().tobytes(),
            torch.cat([part.tokens["teacher"] for part in parts]).tolist(),
            parts[0].next_position,
        )
        for parts in batches
    ]


def test_ranks_workers_and_a_start_in_the_middle_give_the_same_batches(mixed: ShardSet) -> None:
    whole = contents([[batch] for batch in take(mixed, 12)])  # b and c are in their second epoch and more
    for world, workers in ((2, 0), (4, 2)):
        ranks = [take(mixed, 12, rank=rank, world=world, workers=workers) for rank in range(world)]
        assert contents([list(parts) for parts in zip(*ranks, strict=True)]) == whole
    assert contents([[batch] for batch in take(mixed, 5, start=7 * BATCH, workers=2)]) == whole[7:]


def test_a_sample_is_that_of_its_source(mixed: ShardSet) -> None:
    order, found = order_of(mixed), Counter[str]()
    assert isinstance(order, MixtureOrder)
    for batch in take(mixed, 6):
        for index, tokens in zip(batch.index.tolist(), batch.tokens["teacher"], strict=True):
            number = int(text_of(tokens).removeprefix("caption "))
            assert "abc"[number // 100] == order.source_of(index)
            found[order.source_of(index)] += 1
        assert {name: counter.seen for name, counter in batch.bad.by_source.items()} == {"a": 4, "b": 2, "c": 2}
    assert found == {"a": 24, "b": 12, "c": 12}
    assert dict(zip("abc", order.counts(6), strict=True)) == found


def test_what_cannot_be_used_is_replaced_by_its_own_source(tmp_path: Path) -> None:
    bad = [("bomb.png", bomb_png(9_000, 9_000)), ("bomb.txt", b"a bomb")]
    spoiled = table(tmp_path, good=1.0)
    members = [member for number in range(3) for member in pair(f"good{number}", 500 + number)]
    spoiled["spoiled"] = {"weight": 1.0, "shards": str(write_tar(tmp_path / "s.tar", [*members, *bad]))}
    shards, used = open_shards(spoiled), Counter[str]()
    order = order_of(shards)
    assert isinstance(order, MixtureOrder)
    with stream(shards) as batches:
        for batch in itertools.islice(batches, 8):
            drawn = order.indices(batch.position, BATCH)
            assert np.array_equal(order.sources_of(drawn), order.sources_of(batch.index.numpy()))
            assert 43 not in batch.index.tolist()
            used.update({name: counter.seen - counter.total for name, counter in batch.bad.by_source.items()})
            by_source = batch.bad.by_source
            assert by_source["good"].total == 0
            assert by_source["spoiled"].counts == batch.bad.counts
            assert sum(counter.seen for counter in by_source.values()) == batch.bad.seen
            if batch.bad.total:
                assert str(batch.bad.example).startswith(f"too_large: spoiled: {tmp_path}/s.tar: bomb")
    assert used == {"good": 32, "spoiled": 32}


def test_too_many_bad_ones_of_all_name_their_source(tmp_path: Path) -> None:
    sources = table(tmp_path, good=None)
    blind = [("two.txt", b"no picture"), ("three.txt", b"none")]
    sources["lacking"] = {"shards": str(write_tar(tmp_path / "l.tar", [*pair("one", 1), *blind]))}
    said = r"2 of 43 samples .*missing_image 2 \(by source: lacking 2 of 3\)\. Example: missing_image: lacking: "
    with pytest.raises(ValueError, match=said):
        open_shards(sources)
    assert len(open_shards(sources, max_bad_fraction=0.05)) == 43
    sources["lacking"]["shards"] = str(write_tar(tmp_path / "n.tar", blind))
    with pytest.raises(ValueError, match=r"data\.train\.lacking: none of the 2 samples has both an image and a caption"):
        open_shards(sources, max_bad_fraction=0.9)


def test_shards_that_are_missing_empty_or_in_two_sources_name_the_source(tmp_path: Path) -> None:
    sources = table(tmp_path, a=None, b=None)
    with pytest.raises(ValueError, match=r"data\.train: source b: no shard .*nowhere\.tar"):
        open_shards({**sources, "b": {"shards": str(tmp_path / "nowhere.tar")}})
    with pytest.raises(ValueError, match=r"a\.tar is named twice, by 'source a' and by 'source again'"):
        open_shards({**sources, "again": {"shards": [str(tmp_path / "a.tar")]}})
    with pytest.raises(ValueError, match=r"source void: 1 shards, but not one sample"):
        open_shards({**sources, "void": {"shards": str(write_tar(tmp_path / "void.tar", []))}})


def test_the_samples_are_those_of_a_list_of_the_same_shards(tmp_path: Path) -> None:
    """So a store of one is a store of the other, whatever the weights."""
    sources = table(tmp_path, a=3.0, b=1.0)
    mixed, plain = open_shards(sources), open_shards([one["shards"] for one in sources.values()])
    assert mixed.signature == plain.signature
    assert mixed.sources == (Source("a", 40, 3.0), Source("b", 20, 1.0))
    assert [source.weight for source in open_shards(table(tmp_path, a=None, b=None)).sources] == [40.0, 20.0]
    assert mixed.where(45) == f"b: {plain.where(45)}"


def test_data_check_reads_a_table_and_refuses_as_a_run_does(tmp_path: Path, recipe_file: Path) -> None:
    def checked(*sets: str) -> tuple[int, str]:
        arguments = ["data", "check", "--recipe", str(recipe_file), *(part for one in sets for part in ("--set", one)), "--json"]
        told = CliRunner().invoke(app, arguments, catch_exceptions=False)
        return told.exit_code, told.stdout

    write_set(tmp_path / "big", 30, 2)
    write_set(tmp_path / "few", 5, 1)
    table = {name: f"{{ shards = '{tmp_path}/{name}/*.tar', weight = {weight} }}" for name, weight in (("big", 7), ("few", 1))}
    given = f"data.train={{ big = {table['big']}, few = {table['few']} }}"
    code, told = checked(given, "data.workers=0")
    assert (code, '"few": {\n   "samples": 5,\n   "share": 0.125,\n   "read": 5,\n   "usable": 5' in told) == (0, True)
    code, told = checked(given, "data.workers=0", "data.train.few.weight=7")
    assert code == 1
    assert "data.train.few: 5 samples, and by its weight, 0.5 of all, optim.batch = 16 takes 8 of them at once" in told
