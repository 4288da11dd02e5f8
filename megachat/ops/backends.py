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
        _check_is_cpu(device)
        cpu_kernels.prepare()


def check(backend: Backend, device: torch.device) -> None:
    """Refuses a backend that `prepare` would refuse, as far as it can be known without a build.

    Raises:
        KernelError: As there; a compiler that fails shows only when it is called.
    """
    if backend is Backend.CUDA:
        cuda_kernels.check(device)
    if backend is Backend.CPU:
        _check_is_cpu(device)
        cpu_kernels.check()


def _check_is_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        raise KernelError(
            f'backend = "cpu" needs a model on the CPU, and this one is on {device}: use '
            'backend = "cuda" or "reference"'
        )
