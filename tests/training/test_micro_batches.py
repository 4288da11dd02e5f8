from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.training.micro_batches import MicroBatchRows, plan_micro_batches

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=50)
SHARDS = st.integers(1, 9)
ROWS = st.integers(1, 12)


def _real_rows(micro_batch: MicroBatchRows) -> tuple[int, ...]:
    return micro_batch.rows[: micro_batch.num_real]


@given(LENGTHS, SHARDS, ROWS)
@settings(deadline=None)
def test_every_row_counts_exactly_once(lengths: list[int], shards: int, rows: int) -> None:
    plan = plan_micro_batches(lengths, num_shards=shards, rows_per_micro_batch=rows)
    counted = Counter(row for shard in plan.shards for cut in shard for row in _real_rows(cut))
    assert counted == Counter(range(len(lengths)))


@given(LENGTHS, SHARDS, ROWS)
@settings(deadline=None)
def test_all_micro_batches_and_all_shards_have_one_shape(
    lengths: list[int], shards: int, rows: int
) -> None:
    plan = plan_micro_batches(lengths, num_shards=shards, rows_per_micro_batch=rows)
    assert len(plan.shards) == shards
    assert len({len(shard) for shard in plan.shards}) == 1
    sizes = {len(cut.rows) for shard in plan.shards for cut in shard}
    assert len(sizes) == 1
    assert 1 <= sizes.pop() <= rows


@given(LENGTHS, SHARDS, ROWS)
@settings(deadline=None)
def test_fillers_are_rows_of_the_batch_and_as_few_as_possible(
    lengths: list[int], shards: int, rows: int
) -> None:
    plan = plan_micro_batches(lengths, num_shards=shards, rows_per_micro_batch=rows)
    cuts = [cut for shard in plan.shards for cut in shard]
    assert all(0 <= row < len(lengths) for cut in cuts for row in cut.rows)
    size = len(cuts[0].rows)
    needed = -(-len(lengths) // size)
    assert len(cuts) == -(-needed // shards) * shards
    assert sum(cut.num_real < size for cut in cuts) <= len(cuts) - needed + 1


@given(LENGTHS, SHARDS, ROWS)
@settings(deadline=None)
def test_order_of_the_shards_end_to_end_leads_back_to_the_rows(
    lengths: list[int], shards: int, rows: int
) -> None:
    plan = plan_micro_batches(lengths, num_shards=shards, rows_per_micro_batch=rows)
    order = plan.rows_in_order
    flat = [row for shard in plan.shards for cut in shard for row in cut.rows]
    assert len(order) == len(flat)
    assert all(real in (-1, row) for real, row in zip(order, flat, strict=True))
    assert sorted(row for row in order if row >= 0) == list(range(len(lengths)))


@given(LENGTHS, SHARDS, ROWS)
@settings(deadline=None)
def test_a_micro_batch_holds_the_same_rows_for_every_data_degree(
    lengths: list[int], shards: int, rows: int
) -> None:
    """Its number is what dropout is keyed by."""
    plan = plan_micro_batches(lengths, num_shards=shards, rows_per_micro_batch=rows)
    size = len(plan.shards[0][0].rows)
    alone = plan_micro_batches(lengths, num_shards=1, rows_per_micro_batch=size)
    by_index = {cut.index: cut for shard in plan.shards for cut in shard}
    assert sorted(by_index) == list(range(len(by_index)))
    for cut in alone.shards[0]:
        assert by_index.pop(cut.index) == cut
    assert all(cut.num_real == 0 for cut in by_index.values())


@given(LENGTHS, SHARDS, ROWS)
@settings(deadline=None)
def test_rows_of_similar_length_share_a_micro_batch(
    lengths: list[int], shards: int, rows: int
) -> None:
    plan = plan_micro_batches(lengths, num_shards=shards, rows_per_micro_batch=rows)
    cuts = sorted((cut for shard in plan.shards for cut in shard), key=lambda cut: cut.index)
    in_order = [lengths[row] for cut in cuts for row in _real_rows(cut)]
    assert in_order == sorted(lengths, reverse=True)


@given(LENGTHS, SHARDS, ROWS)
@settings(deadline=None)
def test_padded_tokens_of_two_shards_differ_by_two_micro_batches_at_most(
    lengths: list[int], shards: int, rows: int
) -> None:
    plan = plan_micro_batches(lengths, num_shards=shards, rows_per_micro_batch=rows)
    loads = [
        sum(len(cut.rows) * max(lengths[row] for row in cut.rows) for cut in shard)
        for shard in plan.shards
    ]
    size = len(plan.shards[0][0].rows)
    assert max(loads) - min(loads) <= 2 * size * max(lengths)


def test_a_plan_is_what_it_is_meant_to_be() -> None:
    plan = plan_micro_batches([3, 9, 5, 7, 1], num_shards=2, rows_per_micro_batch=2)
    first, second = plan.shards
    assert [(cut.index, cut.rows, cut.num_real) for cut in first] == [
        (0, (1, 3), 2),
        (3, (4, 4), 0),
    ]
    assert [(cut.index, cut.rows, cut.num_real) for cut in second] == [
        (1, (2, 0), 2),
        (2, (4, 4), 1),
    ]


def test_a_batch_smaller_than_the_ranks_gives_each_a_row_at_a_time() -> None:
    plan = plan_micro_batches([4, 2], num_shards=4, rows_per_micro_batch=8)
    assert [[(cut.rows, cut.num_real) for cut in shard] for shard in plan.shards] == [
        [((0,), 1)],
        [((1,), 1)],
        [((1,), 0)],
        [((1,), 0)],
    ]
