"""The CUDA backend on CPU tensors: its kernels run on the emulator, all above them is real."""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megachat.ops import cuda_kernels
from megachat.ops.registry import registered_ops
from tests.kernels.build import KERNELS, kernel_library
from tests.kernels.launch import Order

MULTIPROCESSORS = 108
"""Of the device that launchers are told of, so that they split their work as on a GPU."""


class EmulatedLibrary:
    """What nvcc makes one library of, here a library for each source."""

    def __init__(self, order: Order | None = None) -> None:
        self._order = order
        self._libraries: dict[str, ctypes.CDLL] = {}

    def __getattr__(self, function: str) -> Any:
        names = [path.stem for path in (KERNELS / "cuda").glob("*.cu")]
        stem = max((name for name in names if function.startswith(f"megachat_{name}")), key=len)
        if stem not in self._libraries:
            library = ctypes.CDLL(str(kernel_library(KERNELS / "cuda" / f"{stem}.cu")))
            if self._order is not None:
                library.simt_set_order(self._order.kind, self._order.seed)
            self._libraries[stem] = library
        return getattr(self._libraries[stem], function)


class KernelCalls(TorchDispatchMode):
    """Counts the calls of this project's CUDA operations by name, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "megachat":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def emulated_cuda(order: Order | None = None) -> Iterator[None]:
    """`Backend.CUDA` computes with tensors on the CPU.

    Args:
        order: How threads take turns; None leaves the emulator's own.
    """
    launchers = cuda_kernels.Launchers(
        EmulatedLibrary(order),  # type: ignore[arg-type]
        stream=lambda device: 0,
        multiprocessors=MULTIPROCESSORS,
    )
    dispatched = torch.library.Library("megachat", "IMPL")
    for op in registered_ops().values():
        if op.cuda is not None:
            dispatched.impl(op.name, op.cuda.launch, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_kernels, "launchers", lambda device: launchers)
        yield
    dispatched._destroy()
