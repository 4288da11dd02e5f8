"""Watches the storages of fake tensors: how many bytes live, and what an allocator takes for them.

Fake tensors have no values. Where production code asks for one (the length of a row, whether a
gradient is finite), the ledger answers, and lists who asked.
"""

import contextlib
import gc
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megachat.parallel import cpu_compat, memory
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout
from tools.allocator_model import Block, CachingAllocatorModel


class ByteLedger(TorchDispatchMode):
    """Counts the bytes of living tensor storages, each once, and answers for missing values."""

    def __init__(self, *, row_tokens: int) -> None:
        """Starts at zero.

        Args:
            row_tokens: Length of every row, asked for where batches are cut.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.reads: dict[str, None] = {}
        self._row_tokens = row_tokens
        self._known: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and takes note of its results."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._answer(args[0])
        if func is torch.ops.aten.index.Tensor and _picks_by_mask(args[1]):
            # How many elements a mask picks is a value, too: all of them.
            mask = args[1][0]
            out = args[0].flatten(0, mask.dim() - 1).clone()
        else:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._take_note(leaf.untyped_storage())
        return out

    def _take_note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is not None:
            if known[0] == size:
                return
            self.live -= known[0]
        self._known[key] = (size, weakref.ref(storage, lambda _: self._forget(key)))
        self.live += size
        self._resized(key, size)

    def settle(self) -> None:
        """Takes note of storages that were resized, which is no operation of a tensor."""
        for _, reference in list(self._known.values()):
            storage = reference()
            if storage is not None:
                self._take_note(storage)

    def _resized(self, key: int, size: int) -> None:
        """A storage is new, or has another size than before."""

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)[0]

    def _answer(self, tensor: Tensor) -> bool | int | float:
        """A tensor's value, which does not exist: rows are full, every step is finite."""
        frames = [
            frame
            for frame in traceback.extract_stack()[:-2]
            if "/torch/_" not in frame.filename and frame.filename != __file__
        ]
        line = frames[-1].line or ""
        self.reads[line] = None
        if any(frame.name == "_cut" for frame in frames):
            return self._row_tokens
        is_good = not any(word in line for word in ("overflow", "isfinite"))
        return is_good if tensor.dtype is torch.bool else float(is_good)


class DeviceLedger(ByteLedger):  # type: ignore[no-untyped-call]
    """A ledger of one device: each storage on it is a block of a modelled allocator.

    Real tensors, such as views of arena and cache, are none of the allocator's business, and so are
    the copies that offloading keeps in host memory.
    """

    def __init__(self, allocator: CachingAllocatorModel, *, row_tokens: int) -> None:
        """Starts without storages.

        Args:
            allocator: Whose memory the device's tensors take.
            row_tokens: As `ByteLedger`.
        """
        super().__init__(row_tokens=row_tokens)
        self.allocator = allocator
        self._blocks: dict[int, Block] = {}
        self._is_elsewhere: set[int] = set()
        self._dead: deque[int] = deque()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and takes note of its results."""
        if func is torch.ops.aten.empty.memory_format and _is_host_copy():
            out = func(*args, **(kwargs or {}))
            self._free_dead()
            self._is_elsewhere.add(out.untyped_storage()._cdata)
            self._take_note(out.untyped_storage())
            return out
        if func.is_view and not isinstance(args[0], FakeTensor):
            out = func(*args, **(kwargs or {}))
            self._free_dead()
            self._is_elsewhere.add(out.untyped_storage()._cdata)
            return out
        return super().__torch_dispatch__(func, types, args, kwargs)

    def settle(self) -> None:
        """As `ByteLedger`; frees what has died, too."""
        super().settle()
        self._free_dead()

    def _take_note(self, storage: torch.UntypedStorage) -> None:
        self._free_dead()
        if storage.device.type == "meta":  # what is behind a fake tensor
            super()._take_note(storage)

    def _resized(self, key: int, size: int) -> None:
        if key in self._is_elsewhere:
            return
        if key in self._blocks:
            self.allocator.free(self._blocks.pop(key))
        if size:
            self._blocks[key] = self.allocator.allocate(size)

    def _forget(self, key: int) -> None:
        super()._forget(key)
        # The garbage collector may call this in the middle of anything.
        self._dead.append(key)

    def _free_dead(self) -> None:
        while self._dead:
            key = self._dead.popleft()
            self._is_elsewhere.discard(key)
            if key in self._blocks:
                self.allocator.free(self._blocks.pop(key))


def _is_host_copy() -> bool:
    """Whether an allocation is for the host: on the CPU one memory serves both sides."""
    frame, code = sys._getframe(2), memory._host_copy.__code__
    for _ in range(8):
        if frame.f_code is code:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _picks_by_mask(indices: Any) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype is torch.bool


@contextlib.contextmanager
def fake_rank(layout: ParallelLayout, rank: int) -> Iterator[ProcessGroups]:
    """The communicators of one rank of a world that does not exist."""
    cpu_compat.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    # DeepSpeed collects garbage for each tensor it prepares: modules need not be looked through.
    gc.freeze()
    try:
        yield ProcessGroups.create(layout)
    finally:
        gc.unfreeze()
        dist.destroy_process_group()
