"""The CUDA backend on CPU tensors: its kernels run on the emulator, all above them is real."""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megachat.ops import cuda_kernels, peer_memory
from megachat.ops.registry import dispatched_kernels
from tests.kernels.build import KERNELS, kernel_library
from tests.kernels.launch import Order

MULTIPROCESSORS = 108
"""Of the device that launchers are told of, so that they split their work as on a GPU."""
PATIENCE_MS = 60_000
"""How long the emulator waits for other ranks, on a busy machine."""


class EmulatedLibrary:
    """What nvcc makes one library of, here a library for each source."""

    def __init__(self, order: Order | None = None) -> None:
        self._order = order
        self._libraries: dict[str, ctypes.CDLL] = {}

    def __getattr__(self, function: str) -> Any:
        names = [path.stem for path in (KERNELS / "cuda").glob("*.cu")]
        stem = max((name for name in names if function.startswith(f"megachat_{name}")), key=len)
        return getattr(self.of(stem), function)

    def of(self, stem: str) -> ctypes.CDLL:
        """What a source and an emulator of its own make."""
        if stem not in self._libraries:
            library = ctypes.CDLL(str(kernel_library(KERNELS / "cuda" / f"{stem}.cu")))
            library.simt_error.restype = ctypes.c_char_p
            if self._order is not None:
                library.simt_set_order(self._order.kind, self._order.seed)
            self._libraries[stem] = library
        return self._libraries[stem]


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


def shared_regions(group: ProcessGroup, device: torch.device, num_bytes: int) -> list[Tensor]:
    """As `peer_memory.map_regions`, in memory that all processes of this machine can map."""
    memory = peer_memory.share_memory(group, group.size() * num_bytes)
    assert memory is not None, "the ranks of a test are on one machine"
    return list(torch.frombuffer(memory, dtype=torch.uint8).view(group.size(), num_bytes))


@contextmanager
def emulated_cuda(
    order: Order | None = None, *, patience_ms: int = PATIENCE_MS
) -> Iterator[EmulatedLibrary]:
    """`Backend.CUDA` computes with tensors on the CPU, also where ranks read each other's memory.

    Args:
        order: How threads take turns; None leaves the emulator's own.
        patience_ms: How long a rank waits for others that do not come.
    """
    library = EmulatedLibrary(order)
    launchers = cuda_kernels.Launchers(
        library,  # type: ignore[arg-type]
        stream=lambda device: 0,
        multiprocessors=MULTIPROCESSORS,
    )
    dispatched = torch.library.Library("megachat", "IMPL")
    for name, kernel in dispatched_kernels().items():
        dispatched.impl(name, kernel.launch, "CPU")
    waits = library.of("all_reduce")
    waits.simt_set_patience(patience_ms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_kernels, "launchers", lambda device: launchers)
        patch.setattr(peer_memory, "map_regions", shared_regions)
        yield library
    waits.simt_set_patience(0)
    dispatched._destroy()
