"""The one place for how exact a kernel must be: round-off of its format, and of fp32 within it."""

import torch
from torch import Tensor

FP32_ROUND_OFF = 2.0**-24
"""The largest relative error of one fp32 operation."""


def half_ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of rounding float64 values to a format, element by element."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact).exponent - 1  # |exact| is in [2^exponent, 2^(exponent + 1))
    spacing = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    return spacing.clamp(min=info.tiny * info.eps) / 2


def complaint_about(name: str, got: Tensor, exact: Tensor, internal: Tensor | float) -> str:
    """What is wrong with a result, "" if it is as exact as its format allows.

    Args:
        name: Of the result.
        got: What the kernel wrote.
        exact: The same in float64.
        internal: Bound on the error that fp32 arithmetic leaves before the result is rounded.
    """
    error = (got.double() - exact).abs()
    # A value that fp32 puts on the other side of a power of two is rounded in steps of that side.
    share = error / (half_ulp(exact.abs() + internal, got.dtype) + internal)
    worst = share.argmax() if not share.isnan().any() else share.isnan().int().argmax()
    if share.flatten()[worst] <= 1:
        return ""
    return (
        f"{name}[{worst}] is {got.flatten()[worst]}, exact is {exact.flatten()[worst]}: "
        f"{share.flatten()[worst]:.3g} times the bound"
    )
