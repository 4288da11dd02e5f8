"""`all_reduce` on emulated devices that map each other's memory, against float64."""

import ctypes

import pytest
import torch

from tests.kernels.all_reduce_cases import (
    FUNCTION,
    PACK,
    SOURCE,
    THREADS,
    all_reduce_case,
    calls_of,
    new_region,
)
from tests.kernels.build import kernel_library
from tests.kernels.launch import (
    FORMATS,
    FORWARD,
    INVALID_VALUE,
    LAUNCH_FAILURE,
    ORDERS,
    RANDOM,
    Order,
    run_devices_here,
    run_here,
)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_all_ranks_get_the_same_exact_sum_in_every_call(
    ranks: int, dtype: torch.dtype, order: Order
) -> None:
    """Messages of one pack, of several blocks with a ragged end, and of fewer blocks again."""
    case = all_reduce_case(dtype, ranks=ranks, packs=(1, 2 * THREADS + 3, 5, THREADS + 1, 1))
    assert case.fault_here(order) == ""


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
def test_ranks_may_run_ahead_of_each_other(in_place: bool) -> None:
    for seed in range(40):
        case = all_reduce_case(
            torch.bfloat16, ranks=2 + seed % 3, packs=(3, 9, 3, 3, 40), in_place=in_place
        )
        assert case.fault_here(Order(RANDOM.kind, seed, "random")) == "", seed


@pytest.mark.parametrize("calls_before", [2**32 - 2, 2**31 - 2])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_the_count_of_calls_may_start_again_at_zero(order: Order, calls_before: int) -> None:
    case = all_reduce_case(torch.float32, ranks=3, packs=(4,) * 5, calls_before=calls_before)
    assert case.fault_here(order) == ""


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_the_same_launch_can_be_replayed(order: Order) -> None:
    """As a captured graph does: the same arguments again and again, here in place."""
    messages = [torch.arange(8).float() + 10 * rank for rank in range(4)]
    expected = 4**2 * torch.stack(messages).sum(0)
    regions = tuple(new_region(2) for _ in range(4))
    calls = calls_of(regions, messages, messages, capacity=2 * PACK)
    outcome = run_devices_here(SOURCE, FUNCTION, 3 * calls, order)
    assert outcome.complaint == ""
    assert all(message.equal(expected) for message in messages)


def test_a_large_message_has_several_packs_for_a_thread() -> None:
    """64 blocks of one thread more than a pack each."""
    case = all_reduce_case(torch.float16, ranks=2, packs=(64 * THREADS + 1,))
    assert case.fault_here(FORWARD) == ""


def test_a_nan_of_one_rank_reaches_all() -> None:
    case = all_reduce_case(torch.bfloat16, ranks=4, packs=(2,))
    case.launches[3][1][9] = torch.nan
    assert run_devices_here(SOURCE, FUNCTION, case.launches, FORWARD).complaint == ""
    assert [out.isnan().nonzero().tolist() for out in case.outs[0]] == 4 * [[[9]]]


def test_a_rank_that_does_not_come_is_waited_for() -> None:
    case = all_reduce_case(torch.float32, ranks=3, packs=(1,))
    outcome = run_devices_here(SOURCE, FUNCTION, case.launches[:2], FORWARD)
    assert outcome.code == LAUNCH_FAILURE
    assert "no progress in kernel (all_reduce_kernel<T, 4>):" in outcome.error
    assert "2 threads poll a flag" in outcome.error


def test_an_empty_message_is_no_launch() -> None:
    arguments = list(all_reduce_case(torch.float32, ranks=2, packs=(1,)).launches[0])
    arguments[6] = 0
    assert run_here(SOURCE, FUNCTION, arguments, FORWARD).code == 0


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[(0, 3), (4, -1), (4, 2), (5, 1), (5, 9), (6, -8), (6, 4), (6, 24)],
        *[(7, 0), (7, 2**20 + 1), (1, None), (2, None)],
    ],
)
def test_arguments_outside_the_contract_are_refused(argument: int, value: int | None) -> None:
    arguments = list(all_reduce_case(torch.bfloat16, ranks=2, packs=(2,)).launches[0])
    arguments[argument] = torch.zeros(17).bfloat16()[1:] if value is None else value
    assert run_here(SOURCE, FUNCTION, arguments, FORWARD).code == INVALID_VALUE


def test_a_region_that_is_not_aligned_is_refused() -> None:
    arguments = list(all_reduce_case(torch.bfloat16, ranks=2, packs=(2,)).launches[0])
    arguments[3] = (arguments[3][0], arguments[3][1][1:])
    assert run_here(SOURCE, FUNCTION, arguments, FORWARD).code == INVALID_VALUE


def test_a_region_is_as_large_as_what_a_call_uses() -> None:
    """The sanitized cases hand in exactly this many bytes."""
    size = ctypes.CDLL(str(kernel_library(SOURCE))).megachat_all_reduce_region
    size.restype, size.argtypes = ctypes.c_size_t, [ctypes.c_int64]
    for packs in (1, 128, 129, 5000, 2**16):
        assert size(packs * PACK) == new_region(packs).nbytes
        assert size(packs * PACK - 1) == new_region(packs).nbytes
    assert size(2**20 + 1) == size(0) == 0
