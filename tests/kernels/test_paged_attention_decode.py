"""`paged_attention_decode` on the emulator against float64."""

import ctypes

import pytest
import torch

from megachat.ops.paged_cache import paged_attention_decode
from tests.kernels.build import KERNELS, kernel_library
from tests.kernels.cases import decode_case
from tests.kernels.launch import FORMATS, FORWARD, INVALID_VALUE, ORDERS, RANDOM, Order, run_here

SOURCE = KERNELS / "cuda" / "paged_attention_decode.cu"


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", FORMATS)
def test_it_is_as_exact_as_its_format_for_ragged_lengths(
    dtype: torch.dtype, head_dim: int, order: Order
) -> None:
    for block_size, splits in ((16, 1), (32, 3), (64, 1), (128, 7)):
        lengths = (0, 1, block_size - 1, block_size, block_size + 1, 257)
        case = decode_case(
            dtype, head_dim=head_dim, block_size=block_size, lengths=lengths, splits=splits, heads=1
        )
        assert case.fault_here(order) == "", block_size
    case = decode_case(dtype, head_dim=head_dim, block_size=16, lengths=(700, 0, 33), splits=2)
    assert case.fault_here(order) == ""


@pytest.mark.parametrize("block_size", [17, 48, 100, 255, 256])
def test_any_block_size_from_16_to_256_will_do(block_size: int) -> None:
    case = decode_case(
        torch.bfloat16, head_dim=64, block_size=block_size, lengths=(700, 2 * block_size), splits=2
    )
    assert case.fault_here(FORWARD) == ""


def test_more_splits_than_tokens_leave_some_without_any() -> None:
    case = decode_case(torch.float32, head_dim=64, block_size=16, lengths=(0, 3, 65), splits=64)
    assert case.fault_here(FORWARD) == ""


def test_every_length_up_to_a_few_steps_of_a_group_is_right() -> None:
    case = decode_case(
        torch.float16, head_dim=128, block_size=16, lengths=range(70), splits=2, heads=1
    )
    assert case.fault_here(FORWARD) == ""


def test_the_order_of_threads_and_blocks_does_not_change_a_bit() -> None:
    results = []
    for order in (*ORDERS, RANDOM):
        case = decode_case(torch.float32, head_dim=80, block_size=16, lengths=(90, 300), splits=3)
        assert case.fault_here(order) == ""
        results.append(case.out)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", FORMATS)
def test_it_agrees_with_the_reference_within_the_tolerance_of_the_op(dtype: torch.dtype) -> None:
    case = decode_case(dtype, head_dim=64, block_size=32, lengths=(0, 31, 140), splits=2)
    assert case.fault_here(FORWARD) == ""
    _, query, keys, values, tables, lengths, *_ = case.arguments
    reference = paged_attention_decode.reference(
        query, keys.nan_to_num(0), values.nan_to_num(0), tables.clamp(max=len(keys) - 1), lengths
    )
    torch.testing.assert_close(
        case.out, reference, rtol=0, atol=paged_attention_decode.tolerance[dtype]
    )


def test_a_nan_among_the_keys_of_a_row_stays_with_that_row_and_is_not_hidden() -> None:
    case = decode_case(torch.float32, head_dim=64, block_size=16, lengths=(40, 40), splits=2)
    keys, tables = case.arguments[2], case.arguments[4]
    keys[tables[1, 2], 3] = torch.nan
    run_here(case.source, case.function, case.arguments, FORWARD)
    assert case.out[1].isnan().all()
    assert not case.out[0].isnan().any()


def test_lengths_beyond_the_table_count_as_its_reach() -> None:
    case = decode_case(torch.float32, head_dim=64, block_size=16, lengths=(32,))
    arguments = list(case.arguments)
    arguments[4] = arguments[4][:, :2].contiguous()
    arguments[5] = torch.tensor([10**12])
    arguments[12] = 2
    assert run_here(case.source, case.function, arguments, FORWARD).code == 0
    assert case.wrong_result() == ""


@pytest.mark.parametrize(
    ("argument", "value"),
    [(0, 3), (8, -1), (9, 0), (10, 72), (11, 15), (11, 257), (12, 2**20 + 1), (13, 0), (13, 65)],
)
def test_arguments_outside_the_contract_are_refused(argument: int, value: int) -> None:
    case = decode_case(torch.bfloat16, head_dim=64, block_size=16, lengths=(5,), splits=2)
    arguments = list(case.arguments)
    arguments[argument] = value
    assert run_here(case.source, case.function, arguments, FORWARD).code == INVALID_VALUE


def test_splits_without_a_workspace_are_refused() -> None:
    case = decode_case(torch.bfloat16, head_dim=64, block_size=16, lengths=(5,), splits=2)
    arguments = list(case.arguments)
    arguments[7] = None
    assert run_here(case.source, case.function, arguments, FORWARD).code == INVALID_VALUE


@pytest.mark.parametrize(
    ("rows", "heads", "reach", "multiprocessors", "splits"),
    [
        (1, 12, 2048, 132, 8),  # as many as have 256 tokens each
        (1, 12, 65536, 132, 44),  # as fill the GPU four times
        (1, 1, 65536, 132, 64),  # the most there are
        (64, 12, 2048, 132, 1),  # the rows alone fill it
        (1, 12, 0, 132, 1),
        (0, 12, 2048, 132, 1),
    ],
)
def test_splits_fill_the_gpu_and_stay_long_enough(
    rows: int, heads: int, reach: int, multiprocessors: int, splits: int
) -> None:
    library = ctypes.CDLL(str(kernel_library(SOURCE)))
    choose = library.megachat_paged_attention_decode_splits
    assert choose(rows, heads, reach // 16, 16, multiprocessors) == splits


def test_the_workspace_is_as_large_as_what_the_splits_write() -> None:
    """The sanitized cases hand in exactly this many bytes."""
    library = ctypes.CDLL(str(kernel_library(SOURCE)))
    library.megachat_paged_attention_decode_workspace.restype = ctypes.c_size_t
    for splits in (2, 5):
        case = decode_case(
            torch.float32, head_dim=80, block_size=16, lengths=(50, 3), splits=splits, heads=3
        )
        size = library.megachat_paged_attention_decode_workspace(2, 3, 80, splits)
        assert size == case.arguments[7].nbytes
    assert library.megachat_paged_attention_decode_workspace(2, 3, 80, 1) == 0
