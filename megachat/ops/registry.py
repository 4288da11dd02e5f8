"""The one place that knows which operations have several implementations, and picks one.

An `Op` couples a name and a torch schema with the plain-torch reference that defines the result,
the backends that compute it faster, and how far those may stray from the reference. Each kernel
family has a module that creates its ops; callers pick an implementation once, before their loop:

    attend = paged_attention_decode.on(backend)

CUDA kernels are operations of torch's dispatcher, `torch.ops.megachat.<name>`: tracers, profilers
and whatever else watches what torch dispatches see them, and on fake tensors they give shapes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from megachat.errors import KernelError

P = ParamSpec("P")
R = TypeVar("R")


class Backend(StrEnum):
    """Who computes an operation."""

    REFERENCE = "reference"
    """Plain torch, on any device."""
    CPU = "cpu"
    """Kernels of this project for CPUs."""
    CUDA = "cuda"
    """Kernels of this project for NVIDIA GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaKernel:
    """An operation on CUDA tensors; both functions take the arguments of its schema."""

    launch: Callable[..., Any]
    """Computes it."""
    fake: Callable[..., Any]
    """Makes results of the same shapes, whose content does not matter."""


@dataclass(frozen=True, kw_only=True)
class Op(Generic[P, R]):
    """One operation and its implementations."""

    name: str
    schema: str
    """Arguments and results as torch writes them; a record among the arguments is its fields."""
    reference: Callable[P, R]
    """Defines the result."""
    tolerance: Mapping[torch.dtype, float]
    """Largest error of a backend against the reference in float64, relative to the largest
    element of the result, for every dtype that the operation supports."""
    backends: dict[Backend, Callable[P, R]] = field(default_factory=dict)
    """Faster implementations."""
    cuda: CudaKernel | None = None
    """What `torch.ops.megachat` gets under the operation's name; unless `backends` names another
    way to call it, it is the CUDA backend."""

    def on(self, backend: Backend) -> Callable[P, R]:
        """The implementation of a backend.

        Raises:
            KernelError: The backend does not implement the operation.
        """
        if backend is Backend.REFERENCE:
            return self.reference
        if backend not in self.backends:
            known = ", ".join([Backend.REFERENCE, *self.backends])
            raise KernelError(
                f"{self.name} has no {backend} backend here, only {known}: choose one of these"
            )
        return self.backends[backend]


_OPS: dict[str, Op[Any, Any]] = {}
_KERNELS: dict[str, CudaKernel] = {}
_DISPATCHED: Any = torch.library.Library("megachat", "DEF")  # type: ignore[no-untyped-call]


def register(op: Op[P, R]) -> Op[P, R]:
    """Enters an operation under its name and returns it.

    Raises:
        KernelError: The name is taken.
    """
    if op.name in _OPS:
        raise KernelError(f"an operation named {op.name} is registered already: choose another")
    if op.cuda is not None:
        op.backends.setdefault(Backend.CUDA, define(op.name, op.schema, op.cuda))
    _OPS[op.name] = op
    return op


def define(name: str, schema: str, kernel: CudaKernel) -> Callable[..., Any]:
    """Enters a kernel into torch's dispatcher, as `register` does for one of an `Op`.

    Args:
        name: It becomes `torch.ops.megachat.<name>`.
        schema: Arguments and results as torch writes them.
        kernel: What computes it on CUDA tensors.

    Returns:
        The operation.

    Raises:
        KernelError: The name is taken.
    """
    if name in _KERNELS:
        raise KernelError(f"a CUDA operation named {name} is defined already: choose another")
    _KERNELS[name] = kernel
    _DISPATCHED.define(name + schema)
    _DISPATCHED.impl(name, kernel.launch, "CUDA")
    torch.library.register_fake(f"megachat::{name}", kernel.fake, lib=_DISPATCHED)
    operation: Callable[..., Any] = getattr(torch.ops.megachat, name).default
    return operation


def dispatched_kernels() -> Mapping[str, CudaKernel]:
    """All CUDA kernels in torch's dispatcher, by the name of their operation."""
    return dict(_KERNELS)


def registered_ops() -> Mapping[str, Op[Any, Any]]:
    """All operations of the kernel families that have been imported, by name."""
    return dict(_OPS)
