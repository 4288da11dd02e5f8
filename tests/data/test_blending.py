import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.data.blending import (
    Part,
    bucketed,
    epoch_rows,
    hold_out,
    random_for,
    stage_part,
)

WEIGHTS = st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(sum)


def part(num_rows: int, weight: float = 1.0) -> Part:
    return Part(source="a", num_rows=num_rows, weight=weight)


@settings(deadline=None)
@given(num_rows=st.integers(0, 300), weights=WEIGHTS, seed=st.integers(0, 9))
def test_stage_parts_cover_every_row_once(num_rows: int, weights: list[float], seed: int) -> None:
    parts = [
        stage_part(num_rows, weights=weights, part=index, random=random_for(seed, "split"))
        for index in range(3)
    ]
    assert sorted(np.concatenate(parts)) == list(range(num_rows))


@settings(deadline=None)
@given(num_rows=st.integers(10, 300), weights=WEIGHTS)
def test_stage_parts_have_their_share_to_one_row(num_rows: int, weights: list[float]) -> None:
    for index, weight in enumerate(weights):
        rows = stage_part(num_rows, weights=weights, part=index, random=random_for(1))
        assert abs(len(rows) - num_rows * weight / sum(weights)) <= 1


def test_stage_part_of_weight_zero_is_empty() -> None:
    assert not len(stage_part(100, weights=(10, 0, 0), part=1, random=random_for(1)))
    assert len(stage_part(100, weights=(10, 0, 0), part=0, random=random_for(1))) == 100


@settings(deadline=None)
@given(
    num_rows=st.integers(0, 50),
    share=st.floats(0, 0.99),
    at_most=st.none() | st.integers(1, 5),
)
def test_hold_out_divides_the_rows(num_rows: int, share: float, at_most: int | None) -> None:
    rows = random_for(1).permutation(num_rows)
    held = hold_out(rows, share=share, at_most=at_most)
    assert sorted([*held.train, *held.validation]) == list(range(num_rows))
    assert list(held.train) == sorted(held.train)
    assert len(held.train) > 0 or num_rows == 0
    if share > 0 and num_rows > 1:
        assert len(held.validation) >= 1
    if at_most is not None:
        assert len(held.validation) <= at_most


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 20), st.floats(0.1, 3.0)), min_size=1, max_size=4),
    epoch=st.integers(0, 3),
)
def test_weights_say_how_often_rows_appear(sizes: list[tuple[int, float]], epoch: int) -> None:
    parts = [part(num_rows, weight) for num_rows, weight in sizes]
    counts = np.bincount(
        epoch_rows(parts, seed=1, epoch=epoch), minlength=sum(size for size, _ in sizes)
    )
    begin = 0
    for item in parts:
        own = counts[begin : begin + item.num_rows]
        assert own.sum() == item.rows_per_epoch
        assert own.max(initial=0) - own.min(initial=99) <= 1
        begin += item.num_rows


def test_every_epoch_has_its_own_order_and_its_own_random_half() -> None:
    parts = [part(40, 0.5)]
    first, again = epoch_rows(parts, seed=1, epoch=0), epoch_rows(parts, seed=1, epoch=0)
    second = epoch_rows(parts, seed=1, epoch=1)
    assert list(first) == list(again)
    assert len(first) == len(second) == 20
    assert set(first) != set(second)
    assert list(first) != list(epoch_rows(parts, seed=2, epoch=0))


def test_sources_are_mixed_and_not_one_after_the_other() -> None:
    order = epoch_rows([part(500), part(500)], seed=1, epoch=0)
    assert 200 < (order[:500] < 500).sum() < 300


@settings(deadline=None)
@given(batches=st.integers(1, 12), batch_size=st.integers(1, 4), window=st.integers(1, 5))
def test_bucketing_keeps_every_row(batches: int, batch_size: int, window: int) -> None:
    random = random_for(1)
    order = random.permutation(batches * batch_size)
    lengths = random.integers(1, 50, len(order)).astype(np.int32)
    result = bucketed(
        order, lengths=lengths, batch_size=batch_size, window=window, random=random_for(2)
    )
    assert sorted(result) == sorted(order)


def test_bucketing_saves_padding_without_ordering_the_epoch_by_length() -> None:
    random = random_for(1)
    order = random.permutation(4096)
    lengths = random.integers(1, 100, 4096).astype(np.int32)

    def padded(rows: np.ndarray) -> int:
        return int(lengths[rows].reshape(-1, 16).max(axis=1).sum()) * 16

    result = bucketed(order, lengths=lengths, batch_size=16, window=32, random=random_for(2))
    assert padded(result) < 0.6 * padded(order)
    means = lengths[result].reshape(-1, 16).mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.25


def test_random_numbers_depend_on_seed_and_names_alone() -> None:
    assert random_for(1, "a", 2).integers(1 << 30) == random_for(1, "a", 2).integers(1 << 30)
    assert random_for(1, "a", 2).integers(1 << 30) != random_for(1, "a", 3).integers(1 << 30)


def test_part_gives_at_least_one_row() -> None:
    assert part(3, 0.01).rows_per_epoch == 1
    assert part(0, 2.0).rows_per_epoch == 0
    assert part(10, 1.25).rows_per_epoch == pytest.approx(12, abs=1)
