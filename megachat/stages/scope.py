"""Ends what a stage builds when the stage ends: `stage_scope`."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Thread
from typing import Any, TypeVar

import torch

from megachat.parallel.heap import return_freed_memory
from megachat.parallel.memory import release_cached_memory

_LOG = logging.getLogger(__name__)

_REST_SECONDS = 3.0
"""How long a device may go on working after an error: its work may wait for a rank that is gone."""

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
def stage_scope(device: torch.device, *, synchronize: Callable[[], None]) -> Iterator[StageScope]:
    """A block around a stage that leaves this rank with the memory it began with.

    The stage runs in a function of its own, so that its variables are gone when the block ends.
    After an error everything ends too; what the error's traceback still names stays until the error
    has been told. Nothing waits for a rank that may never come: a device that does not come to rest
    keeps its memory until the process ends, since whoever frees that waits for the device.

    Args:
        device: Whose cached memory goes back to the driver.
        synchronize: Waits until the device has done what it was told.
    """
    with ExitStack() as last:
        last.callback(_give_back, device)
        with ExitStack() as owned:
            try:
                yield StageScope(owned)
            except BaseException:
                if not _comes_to_rest(synchronize):
                    owned.pop_all()
                    last.pop_all()
                    _LOG.warning(
                        "%s still works %.0f s after an error, perhaps on what another rank has to "
                        "answer: its memory is left to the end of the process",
                        *(device, _REST_SECONDS),
                    )
                raise


def _give_back(device: torch.device) -> None:
    """Frees what is in reference cycles, and hands freed memory to the driver and the system."""
    gc.collect()
    release_cached_memory(device)
    return_freed_memory()


def _comes_to_rest(synchronize: Callable[[], None]) -> bool:
    """Whether the device does its work in time; the wait itself cannot be broken off."""
    wait = Thread(target=synchronize, daemon=True)
    wait.start()
    wait.join(_REST_SECONDS)
    return not wait.is_alive()
