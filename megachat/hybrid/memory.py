"""Says where an actor's phases get the memory that they use in turn, and give it back to."""

from typing import Protocol

import torch

from megachat.parallel.memory import PhaseMemory, phase_memory, release_cached_memory
from megachat.reshard.arena import ArenaMemory, arena_memory


class ActorMemory(Protocol):
    """Memory of one device. Arena and cache take theirs beside torch's allocator, not from it."""

    def weights(self, num_bytes: int) -> ArenaMemory:
        """For the weight arena."""

    def cache(self, num_bytes: int) -> PhaseMemory:
        """For keys and values."""

    def release_cached(self) -> None:
        """Hands what torch keeps for later tensors back, so that arena and cache can have it."""


class DeviceActorMemory:
    """The kinds of memory that suit a device."""

    def __init__(self, device: torch.device) -> None:
        """Takes nothing."""
        self._device = device

    def weights(self, num_bytes: int) -> ArenaMemory:
        """Whose addresses stay, and whose physical memory comes and goes in ranges."""
        return arena_memory(num_bytes, self._device)

    def cache(self, num_bytes: int) -> PhaseMemory:
        """Whose physical memory comes and goes as a whole."""
        return phase_memory(num_bytes, self._device)

    def release_cached(self) -> None:
        """Does nothing where one memory serves all, as on the CPU."""
        release_cached_memory(self._device)
