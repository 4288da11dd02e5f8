"""The one place for products with a weight stored as tiles along its input dimension.

After a reshard the tiles of a row-parallel weight come from several training ranks and lie one
after the other: `[tiles, out, in/tiles]`. The product is the sum over tiles.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from megachat.ops import cpu_kernels, cuda_kernels
from megachat.ops.epilogues import bias_relu
from megachat.ops.registry import Backend, CudaKernel, Op, register

FEW_TOKENS = {torch.float32: 128, torch.bfloat16: 128}
"""Up to how many tokens the kernel that reads the weight once is the faster one on a CPU; above,
torch's GEMM catches up. Measured with AVX2, without bf16 instructions."""
FEW_TOKENS_CUDA = 64
"""Up to how many tokens the CUDA kernel multiplies with several tiles; cuBLAS would need a copy of
them as one. With one tile cuBLAS is the faster one, by 3 % for 8 tokens and up to 40 % for 64,
measured on an H200 (docs/measurements/gpu.md)."""
FEW_TOKENS_FUSED_CUDA = 8
"""Up to how many tokens the CUDA kernel, which adds the bias as it goes, is as fast as cuBLAS and a
kernel behind it."""
WIDENED_ROWS = 4096
"""Rows of a bf16 weight that are made float32 at a time."""


def _tiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies; sums over tiles in float32, so that bf16 results do not depend on the tiling.

    Args:
        x: `[tokens, in]`, columns in the order of the tiles.
        weight: `[tiles, out, in/tiles]`.

    Returns:
        `[tokens, out]` in the dtype of `x`.
    """
    if len(weight) == 1:
        return F.linear(x, weight[0])
    parts = x.float().chunk(len(weight), dim=1)
    total = parts[0] @ weight[0].float().t()
    for part, tile in zip(parts[1:], weight[1:], strict=True):
        total.addmm_(part, tile.float().t())
    return total.to(x.dtype)


def _on_cpu(x: Tensor, weight: Tensor) -> Tensor:
    """The kernel for few tokens, torch's GEMM for many.

    Where the CPU has no bf16 instructions, torch's bf16 GEMM is several times slower than its
    float32 one: there the weight is widened, which is exact, some rows at a time.
    """
    if len(x) <= FEW_TOKENS.get(x.dtype, 0):
        return cpu_kernels.tiled_linear(x, weight)
    if x.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return _tiled_linear(x, weight)
    wide, out = x.float(), x.new_empty(len(x), weight.shape[1])
    for start in range(0, weight.shape[1], WIDENED_ROWS):
        rows = slice(start, start + WIDENED_ROWS)
        out[:, rows] = _tiled_linear(wide, weight[:, rows].float())
    return out


def _on_cuda(x: Tensor, weight: Tensor) -> Tensor:
    """The kernel for few tokens and several tiles, else cuBLAS.

    There the tiles are put together first: a copy of the weight is little beside a product of many
    tokens, and one product sums in float32 whatever the tiling.
    """
    if len(weight) > 1 and len(x) <= FEW_TOKENS_CUDA:
        product: Tensor = torch.ops.megachat.tiled_linear(x, weight)
        return product
    return F.linear(x, weight.transpose(0, 1).flatten(1))


def _tiled_linear_bias_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Multiplies, adds a bias and cuts off what is negative.

    Args:
        x: As `tiled_linear`.
        weight: As `tiled_linear`.
        bias: `[out]`.

    Returns:
        `[tokens, out]` in the dtype of `x`.
    """
    return bias_relu.reference(_tiled_linear(x, weight), bias)


def _bias_relu_on_cpu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return bias_relu.on(Backend.CPU)(_on_cpu(x, weight), bias)


def _bias_relu_on_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One kernel for few tokens, one after cuBLAS for many."""
    if len(x) <= FEW_TOKENS_FUSED_CUDA:
        out: Tensor = torch.ops.megachat.tiled_linear_bias_relu(x, weight, bias)
        return out
    return bias_relu.on(Backend.CUDA)(_on_cuda(x, weight), bias)


tiled_linear = register(
    Op(
        name="tiled_linear",
        schema="(Tensor x, Tensor weight) -> Tensor",
        reference=_tiled_linear,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3},
        backends={Backend.CPU: _on_cpu, Backend.CUDA: _on_cuda},
        cuda=CudaKernel(launch=cuda_kernels.tiled_linear, fake=cuda_kernels.new_product),
    )
)
"""A row-parallel product over the tiles of one generation shard."""

tiled_linear_bias_relu = register(
    Op(
        name="tiled_linear_bias_relu",
        schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor",
        reference=_tiled_linear_bias_relu,
        tolerance=tiled_linear.tolerance,
        backends={Backend.CPU: _bias_relu_on_cpu, Backend.CUDA: _bias_relu_on_cuda},
        cuda=CudaKernel(launch=cuda_kernels.tiled_linear_bias_relu, fake=cuda_kernels.new_product),
    )
)
"""The first product of a feed-forward block and what follows it."""
