"""The one place for cases of the feed-forward kernels: `tiled_linear` and `bias_relu`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.accuracy import FP32_ROUND_OFF, complaint_about
from tests.kernels.cases import Case
from tests.kernels.launch import FORMATS


@dataclass(frozen=True)
class LinearCase(Case):
    """`tiled_linear`, or `bias_relu`."""

    out: Tensor
    exact: Tensor
    internal: Tensor

    def wrong_result(self) -> str:
        return complaint_about("out", self.out, self.exact, self.internal)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a product is asked for, without its format."""

    tokens: int
    outputs: int
    width: int
    """Inputs of a tile."""
    tiles: int = 1
    splits: int = 1
    bias: bool = False
    relu: bool = False
    interleaved: bool = False
    """Tiles are columns of the rows of one matrix; else one matrix after another."""


def linear_case(dtype: torch.dtype, shape: Shape) -> LinearCase:
    """A weight with gaps between rows, tiles too, that are NaN; its storage ends with its last row.

    fp32 adds up the products of a split in some order, then the splits, then the bias. A sum in any
    order errs by at most a round-off for each addition of the sum of absolute values; products of
    16-bit numbers are exact in fp32, others cost one more round-off.
    """
    generator = torch.Generator().manual_seed(shape.outputs + shape.width + shape.tokens)
    columns = shape.tiles * shape.width
    x = torch.randn(shape.tokens, columns, generator=generator).to(dtype)
    bias = 4 * torch.randn(shape.outputs, generator=generator).to(dtype) if shape.bias else None
    weight = _strided_weight(dtype, shape)
    weight.copy_(torch.randn(weight.shape, generator=generator))
    whole = weight.double().transpose(0, 1).reshape(shape.outputs, columns)
    exact = x.double() @ whole.T
    size = x.double().abs() @ whole.abs().T
    if bias is not None:
        exact += bias.double()
        size += bias.double().abs()
    roundings = columns + shape.splits + 1 + (dtype is torch.float32)
    out = torch.full((shape.tokens, shape.outputs), torch.nan).to(dtype)
    parts = shape.splits * shape.tokens * shape.outputs if shape.splits > 1 else 0
    return LinearCase(
        kernel="tiled_linear",
        arguments=(
            *(FORMATS[dtype], x, _storage(weight), bias, out),
            *(torch.full((parts,), torch.nan) if parts else None, *weight.stride()[:2]),
            *(shape.tokens, shape.tiles, shape.outputs, shape.width),
            *(int(shape.relu), shape.splits, None),
        ),
        out=out,
        exact=exact.relu() if shape.relu else exact,
        internal=roundings * FP32_ROUND_OFF * size,
    )


def _strided_weight(dtype: torch.dtype, shape: Shape) -> Tensor:
    gap = 16 // dtype.itemsize
    if shape.interleaved:
        tile_stride = shape.width + gap
        row_stride = shape.tiles * tile_stride + gap
    else:
        row_stride = shape.width + gap
        tile_stride = shape.outputs * row_stride + 3 * gap
    last = (shape.tiles - 1) * tile_stride + (shape.outputs - 1) * row_stride
    storage = torch.full((last + shape.width,), torch.nan).to(dtype)
    size = (shape.tiles, shape.outputs, shape.width)
    return storage.as_strided(size, (tile_stride, row_stride, 1))


def _storage(weight: Tensor) -> Tensor:
    """All of the memory behind a view, flat."""
    elements = weight.untyped_storage().nbytes() // weight.itemsize
    return weight.as_strided((elements,), (1,), 0)


def weight_of(case: LinearCase) -> Tensor:
    """The weight of a case as the op takes it, `[tiles, out, in/tiles]`."""
    storage, (tile_stride, row_stride) = case.arguments[2], case.arguments[6:8]
    return storage.as_strided(case.arguments[9:12], (tile_stride, row_stride, 1))


def bias_relu_case(
    dtype: torch.dtype, *, tokens: int, width: int, in_place: bool = False
) -> LinearCase:
    """One addition and no other rounding."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    bias = torch.randn(width, generator=generator).to(dtype)
    exact = (x.double() + bias.double()).relu()
    out = x if in_place else torch.full_like(x, torch.nan)
    return LinearCase(
        kernel="bias_relu",
        arguments=(FORMATS[dtype], x, bias, out, tokens, width, None),
        out=out,
        exact=exact,
        internal=FP32_ROUND_OFF * exact,
    )
