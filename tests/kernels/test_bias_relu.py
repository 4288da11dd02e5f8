"""`bias_relu` on the emulator against float64."""

import pytest
import torch

from megachat.ops.epilogues import bias_relu
from tests.kernels.launch import FORMATS, FORWARD, INVALID_VALUE, ORDERS, Order, run_here
from tests.kernels.linear_cases import bias_relu_case


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("dtype", FORMATS)
def test_it_is_as_exact_as_its_format_at_every_width(dtype: torch.dtype, order: Order) -> None:
    for width, tokens in ((8, 1), (1032, 3), (3072, 2), (8, 1500)):
        case = bias_relu_case(dtype, tokens=tokens, width=width)
        assert case.fault_here(order) == "", width


@pytest.mark.parametrize("dtype", FORMATS)
def test_it_gives_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    case = bias_relu_case(dtype, tokens=4, width=264)
    assert case.fault_here(FORWARD) == ""
    assert case.out.equal(bias_relu.reference(case.arguments[1], case.arguments[2]))


def test_it_may_replace_its_input() -> None:
    case = bias_relu_case(torch.bfloat16, tokens=3, width=136, in_place=True)
    assert case.fault_here(FORWARD) == ""


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_nan_is_not_taken_for_a_negative_number(dtype: torch.dtype) -> None:
    case = bias_relu_case(dtype, tokens=2, width=16)
    case.arguments[1][1, 5] = torch.nan
    assert run_here(case.source, case.function, case.arguments, FORWARD).code == 0
    assert case.out.isnan().nonzero().tolist() == [[1, 5]]


def test_no_tokens_are_no_launch() -> None:
    case = bias_relu_case(torch.float32, tokens=0, width=8)
    assert run_here(case.source, case.function, case.arguments, FORWARD).code == 0


@pytest.mark.parametrize(("argument", "value"), [(0, 3), (4, -1), (5, 0), (5, 12)])
def test_arguments_outside_the_contract_are_refused(argument: int, value: int) -> None:
    case = bias_relu_case(torch.bfloat16, tokens=2, width=16)
    arguments = list(case.arguments)
    arguments[argument] = value
    assert run_here(case.source, case.function, arguments, FORWARD).code == INVALID_VALUE


@pytest.mark.parametrize("argument", [1, 2, 3])
def test_a_tensor_that_is_not_aligned_is_refused(argument: int) -> None:
    case = bias_relu_case(torch.bfloat16, tokens=2, width=16)
    arguments = list(case.arguments)
    arguments[argument] = torch.zeros(33, dtype=torch.bfloat16)[1:]
    assert run_here(case.source, case.function, arguments, FORWARD).code == INVALID_VALUE
