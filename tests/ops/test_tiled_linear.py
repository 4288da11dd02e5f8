"""Products over tiles against the untiled product in float64."""

import pytest
import torch
from torch import Tensor

from megachat.ops import tiled_linear as module
from megachat.ops.registry import Backend
from megachat.ops.tiled_linear import FEW_TOKENS, tiled_linear

DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = (Backend.REFERENCE, Backend.CPU)


def _tiles(weight: Tensor, count: int) -> Tensor:
    """`[out, in]` to `[count, out, in/count]`."""
    return torch.stack(weight.chunk(count, dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_product_over_tiles_is_the_product(
    count: int, dtype: torch.dtype, backend: Backend
) -> None:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(7, 64, generator=generator).to(dtype)
    weight = torch.randn(24, 64, generator=generator).to(dtype)
    found = tiled_linear.on(backend)(x, _tiles(weight, count))
    expected = x.double() @ weight.double().t()
    assert found.dtype is dtype
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= tiled_linear.tolerance[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_results_are_rounded_once_whatever_the_tiling(backend: Backend) -> None:
    """Sums over 512 inputs in bf16 would differ in every second element."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 512, generator=generator).bfloat16()
    weight = torch.randn(96, 512, generator=generator).bfloat16()
    exact = (x.double() @ weight.double().t()).bfloat16()
    for count in (1, 2, 4, 8):
        found = tiled_linear.on(backend)(x, _tiles(weight, count))
        assert (found != exact).float().mean() < 0.01


def test_one_tile_is_an_ordinary_product_bit_for_bit() -> None:
    x, weight = torch.randn(5, 16), torch.randn(8, 16)
    found = tiled_linear.on(Backend.REFERENCE)(x, weight[None])
    assert torch.equal(found, torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_cpu_many_tokens_get_what_few_tokens_get(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the threshold another implementation answers, in pieces that do not divide 20 rows."""
    monkeypatch.setattr(module, "WIDENED_ROWS", 7)
    few = FEW_TOKENS[dtype]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(few + 1, 48, generator=generator).to(dtype)
    weight = torch.randn(2, 20, 24, generator=generator).to(dtype)
    op = tiled_linear.on(Backend.CPU)
    expected = op(x[:few], weight)
    error = (op(x, weight)[:few] - expected).abs().max() / expected.abs().max()
    assert error <= tiled_linear.tolerance[dtype]
