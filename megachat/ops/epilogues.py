"""The one place for what happens to a product's result: bias and ReLU; bias, residual, LayerNorm.

Each reads and writes the activations once; written apart, they would be read and written up to four
times a layer, and a decode step would dispatch twice as many operations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from megachat.ops import cpu_kernels, cuda_kernels
from megachat.ops.registry import Backend, CudaKernel, Op, register


def _bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """`max(x + bias, 0)`; x is `[tokens, width]`, the bias `[width]`."""
    return (x + bias).relu_()


def _bias_residual_layer_norm(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Adds bias and residual, and normalises the sum.

    Args:
        x: `[tokens, hidden]`, a projection's result.
        bias: `[hidden]` of the projection.
        residual: `[tokens, hidden]`.
        weight: `[hidden]` of the LayerNorm.
        norm_bias: `[hidden]` of the LayerNorm.
        epsilon: Added to the variance.

    Returns:
        The sum, which a pre-LN model carries on, and the sum normalised; each `[tokens, hidden]`.
    """
    total = residual + (x + bias)
    return total, F.layer_norm(total, total.shape[-1:], weight, norm_bias, epsilon)


bias_relu = register(
    Op(
        name="bias_relu",
        schema="(Tensor x, Tensor bias) -> Tensor",
        reference=_bias_relu,
        tolerance={torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
        backends={Backend.CPU: cpu_kernels.bias_relu},
        cuda=CudaKernel(launch=cuda_kernels.bias_relu, fake=lambda x, bias: torch.empty_like(x)),
    )
)
"""After the first product of a feed-forward block."""

bias_residual_layer_norm = register(
    Op(
        name="bias_residual_layer_norm",
        schema=(
            "(Tensor x, Tensor bias, Tensor residual, Tensor weight, Tensor norm_bias, "
            "float epsilon) -> (Tensor, Tensor)"
        ),
        reference=_bias_residual_layer_norm,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3},
        backends={Backend.CPU: cpu_kernels.bias_residual_layer_norm},
        cuda=CudaKernel(
            launch=cuda_kernels.bias_residual_layer_norm,
            fake=lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
        ),
    )
)
"""After a row-parallel product, in pre-LN and post-LN order alike."""
