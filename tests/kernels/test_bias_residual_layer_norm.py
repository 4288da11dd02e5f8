"""`bias_residual_layer_norm` on the emulator against float64."""

import pytest
import torch

from tests.kernels.cases import layer_norm_case
from tests.kernels.launch import FORMATS, FORWARD, INVALID_VALUE, ORDERS, Order, run_here


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("pre", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_it_is_as_exact_as_its_format_at_every_width(
    dtype: torch.dtype, pre: bool, order: Order
) -> None:
    """Widths of one lane, of OPT, and such as fill one, two and four packs a thread."""
    for hidden in (8, 32, 264, 768, 1024, 2056, 4096, 12288):
        tokens = 3 if hidden <= 1024 else 1
        case = layer_norm_case(dtype, hidden=hidden, tokens=tokens, pre=pre)
        assert case.fault_here(order) == "", hidden


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("pre", [True, False], ids=["pre", "post"])
def test_it_may_replace_the_residual(pre: bool, order: Order) -> None:
    case = layer_norm_case(torch.bfloat16, hidden=512, pre=pre, in_place=True)
    assert case.fault_here(order) == ""


def test_no_tokens_are_no_launch() -> None:
    case = layer_norm_case(torch.float32, hidden=8, tokens=0)
    assert run_here(case.source, case.function, case.arguments, FORWARD).code == 0


@pytest.mark.parametrize(
    ("argument", "value"),
    [(0, 3), (0, -1), (8, -1), (9, 12), (9, 0), (9, 32776)],
    ids=["format", "negative format", "tokens", "unaligned width", "no width", "too wide"],
)
def test_arguments_outside_the_contract_are_refused(argument: int, value: int) -> None:
    case = layer_norm_case(torch.bfloat16, hidden=16)
    arguments = list(case.arguments)
    arguments[argument] = value
    assert run_here(case.source, case.function, arguments, FORWARD).code == INVALID_VALUE


def test_a_tensor_that_is_not_aligned_is_refused() -> None:
    case = layer_norm_case(torch.bfloat16, hidden=16)
    arguments = list(case.arguments)
    arguments[2] = torch.zeros(17, dtype=torch.bfloat16)[1:]
    assert run_here(case.source, case.function, arguments, FORWARD).code == INVALID_VALUE
