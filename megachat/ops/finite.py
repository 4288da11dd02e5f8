"""Tells numbers from NaN and infinity, and ends a run at the first that is none."""

import math

import torch
from torch import Tensor

from megachat.errors import DivergenceError

_PART = 1 << 20
"""Elements of a tensor of bytes that are widened at once."""

_REMEDY = "lower the learning rate, or look at the weights, the precision and the data it came from"


def all_finite(values: Tensor) -> Tensor:
    """Whether none of the values is NaN or infinite.

    One pass that keeps nothing of the size of the values, which may be the largest weight of a
    model.

    Args:
        values: Floating-point numbers of any shape and dtype.

    Returns:
        A bool scalar on their device.
    """
    if not values.numel():
        return torch.ones((), dtype=torch.bool, device=values.device)
    if values.dtype.itemsize == 1:  # torch compares no floats of 8 bits
        parts = torch.split(values.flatten(), _PART)
        return torch.stack([all_finite(part.float()) for part in parts]).all()
    low, high = torch.aminmax(values)  # both are NaN where any value is
    return low.isfinite() & high.isfinite()


def require_finite(values: Tensor, *, what: str) -> Tensor:
    """Returns the values unless one of them is NaN or infinite.

    Args:
        values: `[rows, ...]`, equal on all ranks, which then raise alike.
        what: What they are, in the plural: "scores of the reward model".

    Raises:
        DivergenceError: Says how many, and which row is the first.
    """
    if bool(all_finite(values)):
        return values
    bad = ~values.isfinite()
    row = int(bad.flatten(1).any(dim=1).nonzero()[0]) if values.dim() > 1 else int(bad.nonzero()[0])
    first = float(values[row][bad[row]].flatten()[0])
    raise DivergenceError(
        f"{int(bad.sum())} of {values.numel()} {what} are not finite, the first is {first} in row "
        f"{row}: {_REMEDY}"
    )


def require_number(value: float, *, what: str) -> float:
    """Returns the value unless it is NaN or infinite.

    Args:
        value: Equal on all ranks, which then raise alike.
        what: What it is: "loss of the actor".

    Raises:
        DivergenceError: It is.
    """
    if not math.isfinite(value):
        raise DivergenceError(f"the {what} is {value}: {_REMEDY}")
    return value
