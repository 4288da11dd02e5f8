"""`paged_attention_prefill` on the emulator against float64."""

import pytest
import torch

from megachat.ops.paged_cache import paged_attention_prefill
from tests.kernels.launch import FORMATS, FORWARD, INVALID_VALUE, ORDERS, RANDOM, Order, run_here
from tests.kernels.prefill_cases import prefill_case


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", FORMATS)
def test_it_is_as_exact_as_its_format_for_ragged_chunks(
    dtype: torch.dtype, head_dim: int, order: Order
) -> None:
    """Chunks below, at and above a tile of queries, empty ones, with and without a past."""
    tiles, long = ((5, 67), (40, 0), (0, 32)), ((697, 3), (0, 20))
    for block_size, more in ((16, tiles), (32, long), (64, tiles), (128, long)):
        chunks = ((0, 1), (block_size - 1, 2), (0, 0), *more)
        case = prefill_case(dtype, head_dim=head_dim, block_size=block_size, chunks=chunks, heads=1)
        assert case.fault_here(order) == "", block_size


@pytest.mark.parametrize("block_size", [17, 48, 100, 128, 255, 256])
def test_any_block_size_from_16_to_256_will_do(block_size: int) -> None:
    case = prefill_case(
        torch.bfloat16,
        head_dim=64,
        block_size=block_size,
        chunks=((0, block_size + 1), (2 * block_size - 1, 2)),
    )
    assert case.fault_here(FORWARD) == ""


def test_a_long_past_and_a_long_chunk_are_right() -> None:
    case = prefill_case(
        torch.float16, head_dim=64, block_size=32, chunks=((700, 3), (0, 300)), heads=1
    )
    assert case.fault_here(FORWARD) == ""


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_length_of_a_chunk_and_of_its_past_is_right(dtype: torch.dtype) -> None:
    """Around the tiles of 16 and 32 keys, and of 32 and 64 queries."""
    chunks = [(past, length) for past in (0, 15, 17) for length in (1, 16, 31, 33, 63, 65)]
    chunks += [(past, 1) for past in range(34)]
    case = prefill_case(dtype, head_dim=64, block_size=16, chunks=chunks, heads=1)
    assert case.fault_here(FORWARD) == ""


def test_scores_that_grow_from_tile_to_tile_are_rescaled() -> None:
    """Scores of several dozens: the first tiles weigh nothing in the end, or everything."""
    case = prefill_case(
        torch.float32, head_dim=64, block_size=16, chunks=((0, 90), (60, 5)), size=3.0
    )
    assert case.fault_here(FORWARD) == ""


def test_the_order_of_threads_and_blocks_does_not_change_a_bit() -> None:
    results = []
    for order in (*ORDERS, RANDOM):
        case = prefill_case(torch.float32, head_dim=80, block_size=16, chunks=((9, 40), (0, 20)))
        assert case.fault_here(order) == ""
        results.append(case.out)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", FORMATS)
def test_it_agrees_with_the_reference_within_the_tolerance_of_the_op(dtype: torch.dtype) -> None:
    case = prefill_case(dtype, head_dim=64, block_size=32, chunks=((0, 31), (70, 12), (3, 0)))
    assert case.fault_here(FORWARD) == ""
    _, query, keys, values, tables, starts, offsets, *_ = case.arguments
    reference = paged_attention_prefill.reference(
        *(query, keys.nan_to_num(0), values.nan_to_num(0)),
        *(tables.clamp(max=len(keys) - 1), starts, offsets),
    )
    torch.testing.assert_close(
        case.out, reference, rtol=0, atol=paged_attention_prefill.tolerance[dtype]
    )


def test_a_nan_among_the_keys_reaches_the_queries_that_see_it_and_no_others() -> None:
    case = prefill_case(torch.float32, head_dim=64, block_size=16, chunks=((4, 40), (0, 40)))
    keys, tables = case.arguments[2], case.arguments[4]
    keys[tables[1, 1], 9] = torch.nan  # token 25
    run_here(case.source, case.function, case.arguments, FORWARD)
    assert case.out[65:].isnan().all()
    assert not case.out[:65].isnan().any()


def test_a_chunk_that_ends_beyond_its_table_sees_the_tokens_up_to_its_reach() -> None:
    inside = prefill_case(torch.float32, head_dim=64, block_size=16, chunks=((31, 1),))
    assert inside.fault_here(FORWARD) == ""
    arguments = list(inside.arguments)
    arguments[4] = arguments[4][:, :2].contiguous()
    arguments[5] = torch.tensor([50])
    arguments[13] = 2
    assert run_here(inside.source, inside.function, arguments, FORWARD).code == 0
    assert inside.wrong_result() == ""


def test_no_tokens_are_no_launch() -> None:
    case = prefill_case(torch.float32, head_dim=64, block_size=16, chunks=((3, 0),))
    assert run_here(case.source, case.function, case.arguments, FORWARD).code == 0


@pytest.mark.parametrize(
    ("argument", "value"),
    [(0, 3), (8, -1), (9, -1), (9, 0), (10, 0), (11, 72), (12, 15), (12, 257), (13, -1), (13, 0)]
    + [(13, 2**20 + 1)],
)
def test_arguments_outside_the_contract_are_refused(argument: int, value: int) -> None:
    case = prefill_case(torch.bfloat16, head_dim=64, block_size=16, chunks=((0, 5),))
    arguments = list(case.arguments)
    arguments[argument] = value
    assert run_here(case.source, case.function, arguments, FORWARD).code == INVALID_VALUE


def test_a_tensor_that_is_not_aligned_is_refused() -> None:
    case = prefill_case(torch.bfloat16, head_dim=64, block_size=16, chunks=((0, 5),))
    arguments = list(case.arguments)
    arguments[1] = torch.zeros(arguments[1].numel() + 1, dtype=torch.bfloat16)[1:]
    assert run_here(case.source, case.function, arguments, FORWARD).code == INVALID_VALUE
