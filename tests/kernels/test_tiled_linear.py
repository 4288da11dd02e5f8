"""`tiled_linear` on the emulator against float64."""

import ctypes
from dataclasses import replace

import pytest
import torch

from megachat.ops.tiled_linear import tiled_linear
from tests.kernels.build import KERNELS, kernel_library
from tests.kernels.launch import FORMATS, FORWARD, INVALID_VALUE, ORDERS, RANDOM, Order, run_here
from tests.kernels.linear_cases import Shape, linear_case, weight_of

SOURCE = KERNELS / "cuda" / "tiled_linear.cu"
RAGGED = Shape(tokens=5, outputs=72, width=136, tiles=2, splits=2, bias=True, relu=True)

SHAPES = (
    Shape(tokens=1, outputs=8, width=8),
    Shape(tokens=5, outputs=72, width=200, tiles=3, bias=True, relu=True),
    Shape(tokens=8, outputs=64, width=256, bias=True),
    Shape(tokens=9, outputs=136, width=72, tiles=2, splits=3, bias=True),
    Shape(tokens=16, outputs=64, width=128, tiles=2, interleaved=True),
    Shape(tokens=23, outputs=24, width=104, tiles=3, splits=2, relu=True, interleaved=True),
    Shape(tokens=33, outputs=72, width=88, bias=True, relu=True),
    Shape(tokens=67, outputs=40, width=320, splits=2),
)
"""Of every number of tokens that a block may have, and one more than a block has; tails of tokens,
outputs and columns; no more columns than one stage, and many more."""


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("dtype", FORMATS)
def test_it_is_as_exact_as_its_format_in_every_shape(dtype: torch.dtype, order: Order) -> None:
    for shape in SHAPES:
        assert linear_case(dtype, shape).fault_here(order) == "", shape


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_number_of_tokens_up_to_a_whole_block_is_right(dtype: torch.dtype) -> None:
    for tokens in range(1, 41):
        shape = Shape(tokens=tokens, outputs=8, width=40, tiles=2)
        assert linear_case(dtype, shape).fault_here(FORWARD) == "", tokens


def test_more_splits_than_stages_leave_some_without_any() -> None:
    assert linear_case(torch.bfloat16, replace(RAGGED, splits=7)).fault_here(FORWARD) == ""


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_order_of_threads_and_blocks_does_not_change_a_bit(dtype: torch.dtype) -> None:
    results = []
    for order in (*ORDERS, RANDOM):
        case = linear_case(dtype, RAGGED)
        assert case.fault_here(order) == ""
        results.append(case.out)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", FORMATS)
def test_how_a_weight_is_tiled_does_not_change_a_bit(dtype: torch.dtype) -> None:
    """Where tiles hold whole stages; the hybrid engine's do when training has 64 columns a rank."""
    apart, rows = (
        linear_case(dtype, Shape(tokens=3, outputs=24, width=64, tiles=4, interleaved=together))
        for together in (False, True)
    )
    whole = linear_case(dtype, Shape(tokens=3, outputs=24, width=256))
    weight_of(whole).view(24, 4, 64).copy_(weight_of(apart).transpose(0, 1))
    weight_of(rows).copy_(weight_of(apart))
    for case in (apart, rows, whole):
        case.arguments[1].copy_(apart.arguments[1])
        assert run_here(case.source, case.function, case.arguments, FORWARD).code == 0
    assert whole.out.equal(apart.out)
    assert whole.out.equal(rows.out)


@pytest.mark.parametrize("dtype", FORMATS)
def test_it_agrees_with_the_reference_within_the_tolerance_of_the_op(dtype: torch.dtype) -> None:
    for tiles in (1, 3):
        case = linear_case(dtype, Shape(tokens=6, outputs=80, width=96, tiles=tiles))
        assert case.fault_here(FORWARD) == ""
        reference = tiled_linear.reference(case.arguments[1], weight_of(case))
        largest = case.exact.abs().max().item()
        torch.testing.assert_close(
            case.out, reference, rtol=0, atol=2 * tiled_linear.tolerance[dtype] * largest
        )


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_nan_in_a_row_of_the_weight_reaches_its_outputs_and_no_others(
    dtype: torch.dtype, splits: int
) -> None:
    case = linear_case(dtype, replace(RAGGED, splits=splits))
    weight_of(case)[1, 70, 135] = torch.nan
    assert run_here(case.source, case.function, case.arguments, FORWARD).code == 0
    expected = torch.zeros(5, 72, dtype=torch.bool)
    expected[:, 70] = True
    assert case.out.isnan().equal(expected)


def test_no_tokens_are_no_launch() -> None:
    case = linear_case(torch.bfloat16, Shape(tokens=0, outputs=8, width=8))
    assert run_here(case.source, case.function, case.arguments, FORWARD).code == 0


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[(0, 3), (6, 12), (6, -8), (7, 140), (7, 128), (8, -1), (9, 0), (9, 2**28)],
        *[(10, 0), (10, 76), (10, 2**22), (11, 0), (11, 132), (13, 0), (13, 33)],
    ],
)
def test_arguments_outside_the_contract_are_refused(argument: int, value: int) -> None:
    arguments = list(linear_case(torch.bfloat16, RAGGED).arguments)
    arguments[argument] = value
    assert run_here(SOURCE, "megachat_tiled_linear", arguments, FORWARD).code == INVALID_VALUE


@pytest.mark.parametrize("argument", [1, 2, 3, 4, 5])
def test_a_tensor_that_is_not_aligned_is_refused(argument: int) -> None:
    arguments = list(linear_case(torch.bfloat16, RAGGED).arguments)
    arguments[argument] = torch.zeros(40000, dtype=torch.bfloat16)[1:]
    assert run_here(SOURCE, "megachat_tiled_linear", arguments, FORWARD).code == INVALID_VALUE


def test_splits_without_a_workspace_are_refused() -> None:
    arguments = list(linear_case(torch.bfloat16, RAGGED).arguments)
    arguments[5] = None
    assert run_here(SOURCE, "megachat_tiled_linear", arguments, FORWARD).code == INVALID_VALUE


@pytest.mark.parametrize(
    ("tokens", "tiles", "outputs", "width", "splits"),
    [
        (8, 1, 50272, 768, 1),  # the outputs alone fill the GPU
        (8, 1, 2048, 8192, 9),  # as fill it twice
        (8, 4, 768, 768, 6),  # as have eight stages each
        (8, 1, 768, 64, 1),
        (200, 4, 2048, 2048, 3),  # four blocks of tokens
        (1, 8, 64, 8192, 32),  # the most there are
        (0, 1, 768, 768, 1),
    ],
)
def test_splits_fill_the_gpu_and_stay_long_enough(
    tokens: int, tiles: int, outputs: int, width: int, splits: int
) -> None:
    choose = ctypes.CDLL(str(kernel_library(SOURCE))).megachat_tiled_linear_splits
    assert choose(FORMATS[torch.bfloat16], tokens, tiles, outputs, width, 132) == splits


def test_a_stage_of_fp32_has_half_the_columns() -> None:
    choose = ctypes.CDLL(str(kernel_library(SOURCE))).megachat_tiled_linear_splits
    assert [choose(FORMATS[dtype], 1, 1, 64, 1024, 132) for dtype in FORMATS] == [4, 2, 2]


def test_the_workspace_is_as_large_as_what_the_splits_write() -> None:
    """The sanitized cases hand in exactly this many bytes."""
    size = ctypes.CDLL(str(kernel_library(SOURCE))).megachat_tiled_linear_workspace
    size.restype = ctypes.c_size_t
    assert size(5, 72, 2) == linear_case(torch.bfloat16, RAGGED).arguments[5].nbytes
    assert size(5, 72, 1) == 0
