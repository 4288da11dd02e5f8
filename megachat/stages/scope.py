"""Ends what a stage builds when the stage ends: `stage_scope`."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch

from megachat.parallel.heap import return_freed_memory
from megachat.parallel.memory import release_cached_memory

OwnerT = TypeVar("OwnerT", bound=AbstractContextManager[Any])


class StageScope:
    """Owns engines and whatever else a stage builds and has to end."""

    def __init__(self, owned: ExitStack) -> None:
        """Ends with `owned`."""
        self._owned = owned

    def own(self, owner: OwnerT) -> OwnerT:
        """Takes an object over: it ends with the stage, before those that came earlier."""
        self._owned.enter_context(owner)
        return owner


@contextmanager
def stage_scope(device: torch.device) -> Iterator[StageScope]:
    """A block around a stage that leaves this rank with the memory it began with.

    The stage runs in a function of its own, so that its variables are gone when the block ends.
    After an error everything ends too, without waiting for a rank that may never come; what the
    error's traceback still names stays until the error has been told.

    Args:
        device: Whose cached memory goes back to the driver.
    """
    try:
        with ExitStack() as owned:
            yield StageScope(owned)
    finally:
        gc.collect()
        release_cached_memory(device)
        return_freed_memory()
