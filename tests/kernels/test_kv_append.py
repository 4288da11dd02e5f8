"""`kv_append` on the emulator, bit by bit against plain loops and the op's reference."""

import pytest
import torch

from megachat.ops.paged_cache import kv_append
from tests.kernels.cases import append_case
from tests.kernels.launch import FORMATS, FORWARD, INVALID_VALUE, ORDERS, Order, run_here


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", FORMATS)
def test_it_writes_the_sums_to_their_slots_and_nothing_else(
    dtype: torch.dtype, head_dim: int, order: Order
) -> None:
    for block_size, tokens in ((16, 1), (32, 7), (64, 5), (128, 5)):
        case = append_case(dtype, head_dim=head_dim, block_size=block_size, tokens=tokens)
        assert case.fault_here(order) == "", block_size


@pytest.mark.parametrize("dtype", FORMATS)
def test_it_agrees_with_the_reference_bit_by_bit(dtype: torch.dtype) -> None:
    case = append_case(dtype, head_dim=80, block_size=16)
    assert case.fault_here(FORWARD) == ""
    _, qkv, bias, query, keys, values, slots, *_ = case.arguments
    other_keys, other_values = torch.zeros_like(keys), torch.zeros_like(values)
    reference = kv_append.reference(qkv, bias, other_keys, other_values, slots)
    assert torch.equal(query, reference)
    for got, expected in ((keys, other_keys), (values, other_values)):
        assert torch.equal(got.flatten(0, 1)[slots], expected.flatten(0, 1)[slots])


@pytest.mark.parametrize(
    ("argument", "value"),
    [(0, 3), (7, -1), (8, 0), (9, 72)],
    ids=["format", "tokens", "heads", "d"],
)
def test_arguments_outside_the_contract_are_refused(argument: int, value: int) -> None:
    case = append_case(torch.float32, head_dim=64, block_size=16)
    arguments = list(case.arguments)
    arguments[argument] = value
    assert run_here(case.source, case.function, arguments, FORWARD).code == INVALID_VALUE
