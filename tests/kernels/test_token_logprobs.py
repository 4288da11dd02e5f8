"""`token_logprobs` on the emulator against float64 and autograd."""

import pytest
import torch

from tests.kernels.launch import FORMATS, FORWARD, INVALID_VALUE, ORDERS, Order, run_here
from tests.kernels.logprob_cases import TEMPERATURE, gradient_case, statistics_case

WIDTHS = ((8, 0), (64, 3), (2048, 0), (6288, 4))


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_statistics_of_a_slice_are_exact(dtype: torch.dtype, order: Order) -> None:
    for width, padding in WIDTHS:
        case = statistics_case(dtype, width=width, padding=padding)
        assert case.fault_here(order) == "", width


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_gradient_is_as_exact_as_its_format(dtype: torch.dtype, order: Order) -> None:
    for width, padding in WIDTHS:
        case = gradient_case(dtype, width=width, padding=padding)
        assert case.fault_here(order) == "", width


@pytest.mark.parametrize("of", [(True, False), (False, True)], ids=["logprobs", "entropy"])
def test_a_gradient_that_is_not_given_is_zero_and_logits_may_be_replaced(
    of: tuple[bool, bool],
) -> None:
    case = gradient_case(torch.bfloat16, width=264, padding=2, of=of, in_place=True)
    assert case.fault_here(FORWARD) == ""


def test_statistics_of_slices_make_up_those_of_the_whole_vocabulary() -> None:
    """A tensor group puts them together this way; one slice is padding alone."""
    logits = torch.randn(3, 192) * 4
    logits[:, 128:] = torch.finfo(torch.float32).min
    targets = torch.tensor([5, 127, 70])
    parts = []
    for start in (0, 64, 128):
        case = statistics_case(torch.float32, width=64, tokens=3)
        arguments = list(case.arguments)
        arguments[1], arguments[2] = logits[:, start : start + 64].contiguous(), targets
        arguments[6] = start
        assert run_here(case.source, case.function, arguments, FORWARD).code == 0
        parts.append(case.statistics)
    maximum, total, weighted, target = torch.stack(parts, 1)
    step = (maximum - maximum.amax(0)).clamp(min=-1e4)
    total, weighted = (step.exp() * total), step.exp() * (weighted + step * total)
    log_total = total.sum(0).log()
    exact = (logits[:, :128].double() / TEMPERATURE).log_softmax(1)
    logprobs = target.sum(0) - maximum.amax(0) - log_total
    entropy = log_total - weighted.sum(0) / total.sum(0)
    expected = exact.gather(1, targets[:, None]).squeeze(1)
    # Shifted logits reach 40, and 40 round-offs of fp32 are 2.4e-6.
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(1), rtol=0, atol=5e-6)


def test_a_nan_logit_is_not_hidden() -> None:
    case = statistics_case(torch.float32, width=64)
    case.arguments[1][2, 7] = torch.nan
    run_here(case.source, case.function, case.arguments, FORWARD)
    assert case.statistics[1].isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("argument", "value"),
    [(0, 3), (4, -1), (5, 0), (5, 12), (7, 0.0), (7, -1.0)],
    ids=["format", "tokens", "no width", "unaligned width", "temperature", "negative temperature"],
)
def test_arguments_outside_the_contract_are_refused(argument: int, value: float) -> None:
    case = statistics_case(torch.bfloat16, width=64)
    arguments = list(case.arguments)
    arguments[argument] = value
    assert run_here(case.source, case.function, arguments, FORWARD).code == INVALID_VALUE
