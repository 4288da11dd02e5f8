"""The one place that makes sure of a backend before anything is computed with it."""

import torch

from megachat.errors import KernelError
from megachat.ops import cpu_kernels, cuda_kernels
from megachat.ops.registry import Backend


def prepare(backend: Backend, device: torch.device) -> None:
    """Builds and loads a backend's kernels, so that whoever configures it learns what is missing.

    Args:
        backend: Who is to compute.
        device: Where the model is.

    Raises:
        KernelError: The kernels are for other devices, or cannot be built or loaded here.
    """
    if backend is Backend.CUDA:
        cuda_kernels.prepare(device)
    if backend is Backend.CPU:
        if device.type != "cpu":
            raise KernelError(
                f'backend = "cpu" needs a model on the CPU, and this one is on {device}: use '
                'backend = "cuda" or "reference"'
            )
        cpu_kernels.prepare()
