"""What follows a product, against float64 and against the separate operations of torch."""

import pytest
import torch
from torch.nn import functional as F

from megachat.ops.epilogues import bias_relu, bias_residual_layer_norm
from megachat.ops.registry import Backend

BACKENDS = (Backend.REFERENCE, Backend.CPU)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 83])
def test_bias_relu_keeps_what_is_positive_and_nan(
    width: int, dtype: torch.dtype, backend: Backend
) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(5, width, generator=generator).to(dtype)
    bias = torch.randn(width, generator=generator).to(dtype)
    x[3, width // 2] = torch.nan
    expected = (x.double() + bias.double()).clamp(min=0)
    found = bias_relu.on(backend)(x.clone(), bias)
    assert found.dtype is dtype
    # One addition, rounded once: equal to the exact sum rounded.
    torch.testing.assert_close(found, expected.to(dtype), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 64, 83, 768])
def test_the_sum_is_the_training_path_s_and_its_norm_is_exact_to_rounding(
    width: int, dtype: torch.dtype, backend: Backend
) -> None:
    generator = torch.Generator().manual_seed(width)
    x, residual = (torch.randn(2, 6, width, generator=generator) * 3 + 1).to(dtype)
    bias, weight, norm_bias = torch.randn(3, width, generator=generator).to(dtype)
    total, normed = bias_residual_layer_norm.on(backend)(x, bias, residual, weight, norm_bias, 1e-5)
    assert torch.equal(total, residual + (x + bias))
    expected = F.layer_norm(total.double(), (width,), weight.double(), norm_bias.double(), 1e-5)
    error = (normed - expected).abs().max() / expected.abs().max()
    assert error <= bias_residual_layer_norm.tolerance[dtype]
