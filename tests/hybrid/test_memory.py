"""The order in which memory changes hands at a phase change, seen from the memory."""

from typing import Any

import torch

from megachat.hybrid.engine import HybridEngine
from megachat.hybrid.memory import DeviceActorMemory
from megachat.hybrid.phases import MemoryMeasures
from megachat.parallel.layout import ParallelLayout
from megachat.parallel.memory import AddressStableBuffer
from tests.harness import run_ranks
from tests.hybrid.test_engine import PRE_LN, SAMPLING, build, prompts, train_step

LAYOUT, GENERATE = ParallelLayout(tensor=2), 1
MEASURES = MemoryMeasures(offload_optimizer=True, reuse_gradients=True)


class WatchedBuffer(AddressStableBuffer):
    """Notes what is asked of it."""

    def __init__(self, num_bytes: int, name: str, events: list[str]) -> None:
        super().__init__(num_bytes, torch.device("cpu"))
        self._name, self._events = name, events

    def acquire(self, start: int = 0, stop: int | None = None) -> None:
        super().acquire(start, stop)
        self._events.append(f"{self._name} takes")

    def release(self, start: int = 0, stop: int | None = None) -> None:
        super().release(start, stop)
        self._events.append(f"{self._name} gives")


class WatchedMemory(DeviceActorMemory):
    """Notes who takes memory, and when the allocator is told to give back what it keeps."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.events: list[str] = []
        self.hybrid: HybridEngine | None = None

    def weights(self, num_bytes: int) -> WatchedBuffer:
        return WatchedBuffer(num_bytes, "arena", self.events)

    def cache(self, num_bytes: int) -> WatchedBuffer:
        return WatchedBuffer(num_bytes, "cache", self.events)

    def release_cached(self) -> None:
        super().release_cached()
        kept = 0
        if self.hybrid is not None:
            state = self.hybrid.training.optimizer_tensors()
            tensors = (*state.masters, *state.moments, *state.gradients)
            kept = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        self.events.append(f"allocator gives back, {kept} bytes of training are left")


def _events_of_two_cycles() -> Any:
    memory = WatchedMemory()
    with build(
        PRE_LN, LAYOUT, GENERATE, torch.bfloat16, measures=MEASURES, memory=memory
    ) as hybrid:
        built = memory.events.copy()
        memory.hybrid = hybrid
        cycles = []
        for step in range(2):
            memory.events.clear()
            with hybrid.generation() as generator:
                generator.generate(prompts(), sampling=SAMPLING, seed=step)
            cycles.append([event for event, _ in _runs(memory.events)])
            train_step(hybrid.training, step)
    return built, cycles


def _runs(events: list[str]) -> list[tuple[str, int]]:
    """Equal neighbours together."""
    runs: list[tuple[str, int]] = []
    for event in events:
        count = runs.pop()[1] if runs and runs[-1][0] == event else 0
        runs.append((event, count + 1))
    return runs


def test_the_allocator_gives_back_after_training_has_left_and_before_arena_and_cache_take() -> None:
    for built, (first, second) in run_ranks(2, _events_of_two_cycles):
        assert built[-1].startswith("allocator gives back"), (
            "where the weights were before adoption"
        )
        released = "allocator gives back, 0 bytes of training are left"
        phase = [released, "arena takes", "cache takes", "cache gives", "arena gives"]
        assert second == phase
        made = ["cache takes", "cache gives"]  # views of it are made once
        assert first == [*phase[:2], *made, *phase[2:]]
