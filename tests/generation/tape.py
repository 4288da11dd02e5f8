"""Recorded steps on the CPU: a stand-in for CUDA graphs that refuses what a graph cannot hold.

The tape notes every operation that torch dispatches, with its arguments, and does the same
operations again on the same tensors. As in a graph, a number that the host had at recording time
stays what it was; reading a device value on the host, or making a tensor from host data, is an
error at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megachat.generation.graphs import Recording

HOST_READS = (
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "lift_fresh",
    "unique", "repeat_interleave.Tensor",
)  # fmt: skip


class HostValueError(AssertionError):
    """A recorded step depends on a value that is on the host."""


@dataclass(frozen=True)
class _Call:
    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any

    def repeat(self) -> None:
        """Does the operation again; its result takes the place of the first one."""
        again = self.function(*self.arguments, **self.keywords)
        inputs = {_memory(leaf) for leaf in _tensors((self.arguments, self.keywords))}
        for old, new in zip(tree_leaves(self.result), tree_leaves(again), strict=True):
            if isinstance(old, Tensor):
                if _memory(old) not in inputs:  # neither a view nor written in place
                    old.copy_(new)
            elif hasattr(new, "wait"):  # of a collective
                new.wait()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func).split(".", 1)[1]
        masks = "index" in name and any(t.dtype == torch.bool for t in _tensors(args[1:2]))
        if masks or name.startswith(HOST_READS):
            raise HostValueError(f"a recorded step calls {func}")
        result = func(*args, **(kwargs or {}))
        self.calls.append(_Call(func, args, kwargs or {}, result))
        return result


@dataclass
class TapeRecorder:
    """Records on tapes and counts."""

    recordings: int = 0
    replays: int = 0
    tapes: list[_Tape] = field(default_factory=list)

    def record(self, compute: Callable[[], Tensor]) -> Recording:
        with _Tape() as tape:
            output = compute()
        self.recordings += 1
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for call in tape.calls:
                    call.repeat()

        return Recording(output=output, replay=replay)

    def close(self) -> None:
        self.tapes.clear()
