import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.sampler import Order, raw

PINNED = [210, 844, 140, 141, 839, 211, 135, 133]
PINNED_RAW = [844147632273947768, 2592160334605157396]
ORDERS = st.builds(
    lambda batch, more, seed, block, window: Order(batch + more, batch, seed, block, window),
    st.integers(1, 40),
    st.integers(0, 400),
    st.integers(0, 2**40),
    st.integers(1, 70),
    st.integers(1, 12),
)


@settings(max_examples=150, deadline=None)
@given(ORDERS, st.integers(0, 5))
def test_every_epoch_visits_each_sample_at_most_once_and_all_but_the_remainder(order: Order, epoch: int) -> None:
    indices = order.indices(epoch * order.epoch_length, order.epoch_length)
    assert len(np.unique(indices)) == order.epoch_length == order.samples // order.batch * order.batch
    assert indices.min() >= 0
    assert indices.max() < order.samples


@settings(max_examples=60, deadline=None)
@given(ORDERS, st.data())
def test_a_slice_is_the_same_whatever_was_asked_before(order: Order, data: st.DataObject) -> None:
    whole = order.indices(0, 2 * order.epoch_length + 3)
    start = data.draw(st.integers(0, 2 * order.epoch_length))
    count = data.draw(st.integers(0, 2 * order.epoch_length + 3 - start))
    assert np.array_equal(order.indices(start, count), whole[start : start + count])
    assert order(start) == whole[start]


def test_each_position_alone_gives_what_a_long_slice_gives() -> None:
    order = Order(107, 10, 0, 4, 3)
    assert order.indices(0, 320).tolist() == [order(position) for position in range(320)]


def test_groups_are_mixed_each_in_its_own_way() -> None:
    order = Order(96, 8, 0, 4, 3)
    places = [np.argsort(order.indices(group * 12, 12)).tolist() for group in range(8)]
    assert len({tuple(place) for place in places}) == 8


def test_the_remainder_differs_between_epochs() -> None:
    order = Order(103, 10, 0, 4, 3)
    left = [frozenset(range(103)) - set(order.indices(epoch * 100, 100).tolist()) for epoch in range(20)]
    assert len(set(left)) > 10


def test_epochs_and_seeds_differ() -> None:
    first = Order(500, 10, 0, 8, 4)
    assert not np.array_equal(first.indices(0, 500), first.indices(500, 500))
    assert not np.array_equal(first.indices(0, 500), Order(500, 10, 1, 8, 4).indices(0, 500))


def test_reads_stay_in_few_blocks_while_samples_are_mixed() -> None:
    order = Order(64 * 100, 64, 0, 64, 4)
    indices = order.indices(0, 4 * 64)
    assert len(set((indices // 64).tolist())) == 4
    assert np.mean(np.diff(indices) == 1) < 0.05


def test_the_order_of_a_seed_never_changes() -> None:
    # a checkpoint stores only the position: another order under the same seed would silently repeat and skip samples
    assert Order(1000, 8, 7, 16, 4).indices(0, 8).tolist() == PINNED
    assert raw(7, "view", (3, 0), 2).tolist() == PINNED_RAW


def test_replacements_are_other_samples_of_the_epoch() -> None:
    order = Order(100, 10, 0, 4, 3)
    epoch = set(order.indices(100, 100).tolist())
    drawn = [order.replacement(117, attempt) for attempt in range(1, 40)]
    assert set(drawn) <= epoch
    assert len(set(drawn)) > 20
    assert drawn == [order.replacement(117, attempt) for attempt in range(1, 40)]


def test_fewer_samples_than_a_global_batch_is_an_error_that_names_both() -> None:
    with pytest.raises(ValueError, match=r"optim\.batch = 64 but the data has 63 samples"):
        Order(63, 64, 0, 8, 8)


@pytest.mark.parametrize("block", [10**9, 2**63 - 1])
def test_a_block_larger_than_the_set_is_the_whole_set(block: int) -> None:
    assert np.array_equal(Order(50, 8, 0, block, 256).indices(0, 96), Order(50, 8, 0, 50, 256).indices(0, 96))


def test_a_large_set_costs_no_table_of_samples() -> None:
    order = Order(50_000_000, 4096, 0, 64, 256)
    indices = order.indices(3 * order.epoch_length - 2048, 4096)
    assert len(indices) == 4096
    assert indices.max() < 50_000_000
