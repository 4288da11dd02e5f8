"""What a closed engine leaves: nothing, whoever still knows it."""

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megachat.errors import CapacityError, PhaseError
from megachat.generation import generator as generator_module
from megachat.generation.generator import Generator
from megachat.generation.kv_cache import PagedKvCache
from megachat.hybrid import engine as hybrid_module
from megachat.hybrid import memory as memory_module
from megachat.hybrid.engine import HybridEngine
from megachat.hybrid.phases import MemoryMeasures
from megachat.model.opt import OptModel
from megachat.ops.registry import Backend
from megachat.parallel.layout import ParallelLayout
from megachat.reshard.arena import WeightArena
from tests.generation.tape import TapeRecorder
from tests.harness import run_ranks
from tests.harness.groups import groups_of
from tests.hybrid.tasks import SMALL, build
from tests.hybrid.test_engine import SAMPLING, prompts, train_step

ONE = (ParallelLayout(), 1)
DTYPES = (torch.float32, torch.bfloat16)
_ADOPT = WeightArena.adopt


class Watch:
    """Weak references to objects and to the memory of tensors, by name."""

    def __init__(self) -> None:
        self._objects: dict[str, weakref.ref[Any]] = {}
        self._memory: dict[str, StorageWeakRef] = {}

    def see(self, **things: Any) -> None:
        for name, thing in things.items():
            if isinstance(thing, Tensor):
                self._memory[name] = StorageWeakRef(thing.untyped_storage())
            elif isinstance(thing, (list, tuple)):
                self.see(**{f"{name}.{number}": part for number, part in enumerate(thing)})
            else:
                self._objects[name] = weakref.ref(thing)

    def alive(self) -> list[str]:
        objects = [name for name, ref in self._objects.items() if ref() is not None]
        return objects + [name for name, ref in self._memory.items() if not ref.expired()]

    def __len__(self) -> int:
        return len(self._objects) + len(self._memory)


def watch(hybrid: HybridEngine) -> Watch:
    """Everything that an actor which has trained and generated holds."""
    seen = Watch()
    training, inner = hybrid.training, hybrid.training._zero1._optimizer
    kept = training.optimizer_tensors()
    seen.see(masters=kept.masters, moments=kept.moments, gradients=kept.gradients)
    seen.see(deepspeed=inner, adam=inner.optimizer)
    assert hybrid._generator is not None and hybrid._generator._placed is not None
    runner = hybrid._generator._placed[1]
    seen.see(runner=runner, tables=runner._cache.tables, pool=runner._cache.pool)
    seen.see(arena=hybrid.arena._elements, arena_memory=hybrid.arena._memory.tensor())
    seen.see(resharder=hybrid._resharder)
    if runner._graphs is not None:
        seen.see(graphs=runner._graphs, tapes=runner._graphs._recorder.tapes)
    if runner._decode_step is not None:
        seen.see(step=runner._decode_step, buffers=list(runner._decode_step._buffers.values()))
    return seen


def _use(hybrid: HybridEngine) -> None:
    for step in range(2):
        with hybrid.generation() as generator:
            generator.generate(prompts(), sampling=SAMPLING, seed=step)
        train_step(hybrid.training, step)


def _ends(case: Mapping[str, Any], *, measures: MemoryMeasures) -> None:
    dtype, backend, recorded = case["dtype"], case["backend"], case["recorded"]
    with pytest.MonkeyPatch.context() as patch:
        if recorded:
            patch.setattr(generator_module, "recorder_for", lambda _: TapeRecorder())
        hybrid = build(SMALL, (0, ONE, dtype), num_blocks=100, backend=backend, measures=measures)
        _use(hybrid)
    model, seen = hybrid.training.model, watch(hybrid)
    assert len(seen.alive()) == len(seen) > 10
    gc.disable()  # the end itself frees, whoever still knows engine, generator and model
    try:
        generator, training = hybrid._generator, hybrid.training
        for _ in range(2):
            hybrid.close()
        assert not seen.alive(), seen.alive()
    finally:
        gc.enable()
    assert isinstance(generator, Generator)
    for parameter in model.parameters():
        assert parameter.numel() == 0 and parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks and not parameter._backward_hooks
        assert not [name for name in vars(parameter) if name.startswith(("_hp", "_dp", "get_full"))]
    sampling = SAMPLING
    for use in (
        hybrid.eval,
        hybrid.train,
        lambda: generator.generate(prompts(), sampling=sampling, seed=0),
        lambda: next(generator.stream(prompts(), sampling=sampling, seed=0)),
        lambda: train_step(training, 0),
        training.step,
        training.resume,
        training.optimizer_tensors,
        training.weights_loaded,
        hybrid.arena.weights,
        generator.cache.acquire,
    ):
        with pytest.raises(PhaseError, match="was closed"):
            use()


def _all_ends() -> None:
    offload = MemoryMeasures(offload_optimizer=True, reuse_gradients=True)
    for dtype in DTYPES:
        for backend, recorded in ((Backend.REFERENCE, True), (Backend.CPU, False)):
            case = {"dtype": dtype, "backend": backend, "recorded": recorded}
            _ends(case, measures=offload if recorded else MemoryMeasures())


def test_a_closed_actor_has_freed_all_that_it_held_and_says_that_it_is_closed() -> None:
    run_ranks(1, _all_ends)


def _old_places_of_the_weights() -> None:
    """Nobody keeps the memory that the weights had before the arena; the driver is offered it."""
    for dtype in DTYPES:
        old: list[StorageWeakRef] = []
        released: list[int] = []

        def adopt(arena: WeightArena, model: OptModel, old: list[StorageWeakRef] = old) -> Any:
            old += [StorageWeakRef(each.untyped_storage()) for each in model.parameters()]
            return _ADOPT(arena, model)

        def release(_: torch.device, old: Any = old, released: list[int] = released) -> None:
            released.append(sum(not ref.expired() for ref in old))

        gc.disable()
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(WeightArena, "adopt", adopt)
                patch.setattr(memory_module, "release_cached_memory", release)
                build(SMALL, (0, ONE, dtype), num_blocks=100).close()
        finally:
            gc.enable()
        assert len(old) > 20 and released == [0]


def test_the_weights_leave_no_copy_where_they_were_before_the_arena() -> None:
    run_ranks(1, _old_places_of_the_weights)


def _fail_to_build() -> None:
    """What was built before a part that fails ends at once: optimizer, then generator."""
    arenas: list[WeightArena] = []
    caches: list[PagedKvCache] = []

    def fail(*_: Any, **__: Any) -> None:
        raise CapacityError("no memory")

    def adopt(arena: WeightArena, model: OptModel) -> Any:
        arenas.append(arena)
        return _ADOPT(arena, model)

    def runner(_: Any, cache: PagedKvCache, **__: Any) -> None:
        caches.append(cache)
        fail()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightArena, "adopt", adopt)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(hybrid_module, "TrainEngine", fail)
            with pytest.raises(CapacityError):
                build(SMALL, (0, ONE, torch.float32), num_blocks=100)
        with pytest.raises(PhaseError, match="WeightArena was closed"):
            arenas[0].acquire()
        hybrid = build(SMALL, (0, ONE, torch.float32), num_blocks=100)
        patch.setattr(generator_module, "ModelRunner", runner)
        with pytest.raises(CapacityError), hybrid.generation():
            pass
        with pytest.raises(PhaseError, match="PagedKvCache was closed"):
            caches[0].acquire()
    train_step(hybrid.training, 0)  # the actor is back in training and whole
    with hybrid.generation() as generator:
        generator.generate(prompts(), sampling=SAMPLING, seed=0)


def test_what_was_built_before_a_part_that_fails_ends_at_once() -> None:
    run_ranks(1, _fail_to_build)


def _groups_after(error: bool) -> tuple[int, int, int]:
    """Communicators of a rank before an actor, with it, and after the end of its block."""

    def count() -> int:
        return len(dist.distributed_c10d._world.pg_names)

    groups_of(layout := ParallelLayout(tensor=2, data=2))
    before = count()
    actor = build(SMALL, (0, (layout, 4), torch.float32), num_blocks=100)
    during = count()
    try:
        with actor:
            _use(actor)
            if error and dist.get_rank() == 1:
                raise CapacityError("no memory")
    except CapacityError:
        assert actor.arena._elements.numel() == 0
    return before, during, count()


@pytest.mark.parametrize("error", [False, True])
def test_communicators_of_generation_end_with_the_actor_and_stay_where_it_failed(
    error: bool,
) -> None:
    for rank, (before, during, after) in enumerate(run_ranks(4, _groups_after, error)):
        assert during > before
        assert after == (during if error and rank == 1 else before)
