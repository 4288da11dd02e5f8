from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megachat.generation.graphs import rows_bucket
from megachat.planner.graphs import graph_bytes, num_column_buckets, num_graphs, row_buckets
from megachat.planner.job import Workload
from tests.planner.jobs import job


@given(st.integers(1, 300))
def test_buckets_are_those_that_generation_records(most: int) -> None:
    assert row_buckets(most) == tuple(sorted({rows_bucket(rows) for rows in range(1, most + 1)}))


@pytest.mark.parametrize(("blocks", "buckets"), [(1, 1), (2, 2), (3, 3), (4, 3), (16, 5), (17, 6)])
def test_block_tables_double_up_to_the_longest(blocks: int, buckets: int) -> None:
    assert num_column_buckets(blocks) == buckets


def test_recordings_are_counted_by_hand() -> None:
    """OPT-1.3B, 4 sequences of 64 + 64 tokens in blocks of 32: 1, 2, 4 rows x 1, 2, 4 columns."""
    work = Workload(prompts=4, prompt_tokens=64, response_tokens=64)
    small = job("1.3b", 2, 1, 1, generate=2, workload=work)
    assert num_graphs(small) == 9
    logits = 3 * (1 + 2 + 4) * (50432 // 2) * 2  # padded to 256
    kernels = 9 * (10 * 24 + 5)
    assert graph_bytes(small) == logits + kernels * 2**14
    assert (
        graph_bytes(replace(small, graphs=False)) == num_graphs(replace(small, graphs=False)) == 0
    )
