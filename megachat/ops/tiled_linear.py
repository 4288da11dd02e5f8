"""The one place for products with a weight stored as tiles along its input dimension.

After a reshard the tiles of a row-parallel weight come from several training ranks and lie one
after the other: `[tiles, out, in/tiles]`. The product is the sum over tiles.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from megachat.ops.registry import Op, register


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


tiled_linear = register(
    Op(
        name="tiled_linear",
        schema="(Tensor x, Tensor weight) -> Tensor",
        reference=_tiled_linear,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3},
    )
)
"""A row-parallel product over the tiles of one generation shard."""
