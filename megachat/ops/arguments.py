"""The one place that refuses tensors which a kernel would misread: it sees only their addresses."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from megachat.errors import KernelError


def check_tensors(
    name: str,
    tensors: Sequence[Tensor],
    *,
    device: torch.device,
    dtypes: Collection[torch.dtype],
    indices: Sequence[Tensor] = (),
    tables: Tensor | None = None,
) -> None:
    """Checks where tensors are, what they hold and how they lie.

    Args:
        name: Of the operation.
        tensors: Contiguous ones of one dtype.
        device: Where all have to be.
        dtypes: What the kernel computes with.
        indices: Contiguous int64 ones.
        tables: int32 ones with contiguous rows.

    Raises:
        KernelError: One is elsewhere, of another dtype or not contiguous.
    """
    dtype = tensors[0].dtype
    if dtype not in dtypes:
        known = " or ".join(str(known).removeprefix("torch.") for known in dtypes)
        raise KernelError(
            f"{name} has no {device.type.upper()} kernel for {dtype}: use {known}, or backend = "
            '"reference"'
        )
    wanted = [(tensor, dtype) for tensor in tensors] + [(index, torch.int64) for index in indices]
    for tensor, expected in wanted:
        if tensor.dtype != expected or tensor.device != device or not tensor.is_contiguous():
            raise KernelError(
                f"{name} needs contiguous {expected} tensors on {device}, got {tensor.dtype} on "
                f"{tensor.device} with shape {list(tensor.shape)}, strides {tensor.stride()}"
            )
    if tables is not None and (
        tables.dtype != torch.int32 or tables.device != device or tables.stride(1) != 1
    ):
        raise KernelError(
            f"{name} needs int32 tables with contiguous rows on {device}, got {tables.dtype} on "
            f"{tables.device} with strides {tables.stride()}"
        )


def numbers_of_tokens(
    name: str, numbers: Sequence[Tensor], gradients: Sequence[Tensor | None], device: torch.device
) -> list[Tensor | None]:
    """What a backward kernel reads of each token, in float32.

    Args:
        name: Of the operation.
        numbers: `[tokens]`, contiguous.
        gradients: `[tokens]` of any strides, since autograd's of a sum is one number, expanded;
            None is 0.
        device: Where all have to be.

    Returns:
        The numbers and the gradients, contiguous.

    Raises:
        KernelError: As `check_tensors`.
    """
    made = [gradient if gradient is None else gradient.contiguous() for gradient in gradients]
    per_token = [*numbers, *made]
    given = [tensor for tensor in per_token if tensor is not None]
    check_tensors(name, given, device=device, dtypes=(torch.float32,))
    return per_token
