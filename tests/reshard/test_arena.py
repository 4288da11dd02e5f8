"""What the arena refuses, and that its views stay where they are."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from megachat.errors import LayoutError, PhaseError
from megachat.model.config import Head, ModelOptions
from megachat.model.opt import OptModel
from megachat.parallel.groups import GenerationGroups, ProcessGroups
from megachat.parallel.layout import GenerationPlacement, ParallelLayout
from megachat.reshard import plan_for_model
from megachat.reshard.arena import ResidentMemory, WeightArena
from megachat.reshard.execute import Resharder
from tests.harness import run_ranks
from tests.reshard.cases import PRE_LN, Case, build_actor

CPU = torch.device("cpu")


def _plan(dtype: torch.dtype = torch.float32, layers: int = 4):  # type: ignore[no-untyped-def]
    return plan_for_model(
        replace(PRE_LN, layers=layers),
        source=ParallelLayout(tensor=2),
        target=ParallelLayout(tensor=1, data=2),
        element_bytes=dtype.itemsize,
    )


def test_a_plan_for_another_size_of_element_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"counts 2 bytes an element, but torch.float32 has 4"):
        WeightArena(_plan(torch.bfloat16), rank=0, dtype=torch.float32, device=CPU)


def test_weights_that_were_never_gathered_are_refused() -> None:
    arena = WeightArena(_plan(), rank=0, dtype=torch.float32, device=CPU)
    with pytest.raises(PhaseError, match="not resident .*version 0.*: gather them"):
        arena.weights()


def test_stale_weights_are_refused_with_both_versions() -> None:
    arena = WeightArena(_plan(), rank=0, dtype=torch.float32, device=CPU)
    arena.mark_gathered()
    assert arena.weights()
    arena.weights_changed()
    assert not arena.is_current
    with pytest.raises(PhaseError, match="are of version 0, training weights of version 1"):
        arena.weights()
    arena.mark_gathered()
    arena.release()
    with pytest.raises(PhaseError, match="not resident"):
        arena.weights()


def test_a_tensor_that_left_the_arena_is_named() -> None:
    arena = WeightArena(_plan(), rank=0, dtype=torch.float32, device=CPU)
    flat = arena.flat(0)
    assert flat is not None
    inside = {"inside": nn.Parameter(flat[3:9].view(2, 3)).data, "all": flat}
    arena.check_aliasing(inside)
    with pytest.raises(PhaseError, match=r"1 of 3 training tensors .*first: stray"):
        arena.check_aliasing({**inside, "stray": flat.clone()})


def test_memory_that_cannot_be_released_keeps_its_content() -> None:
    plan = _plan()
    memory = ResidentMemory(10**7, CPU)
    arena = WeightArena(plan, rank=0, dtype=torch.float32, device=CPU, memory=lambda _: memory)
    memory.tensor().fill_(7)
    arena.release()
    assert memory.tensor().eq(7).all()
    assert not arena.owns(memory.tensor()), "memory behind the arena is not the arena's"


def _adopt_others() -> list[str]:
    groups = ProcessGroups.create(ParallelLayout(tensor=2))
    messages = []
    for layers, dtype in ((2, torch.float32), (4, torch.bfloat16)):
        model = OptModel(
            replace(PRE_LN, layers=layers),
            groups=groups,
            head=Head.LANGUAGE_MODEL,
            options=ModelOptions(dtype=dtype),
            seed=None,
        )
        arena = WeightArena(_plan(), rank=groups.rank, dtype=torch.float32, device=CPU)
        with pytest.raises(LayoutError) as caught:
            arena.adopt(model)
        messages.append(str(caught.value))
    placement = GenerationPlacement(source=groups.layout, tensor=2)
    with pytest.raises(LayoutError) as caught:
        Resharder(
            WeightArena(_plan(), rank=groups.rank, dtype=torch.float32, device=CPU),
            GenerationGroups.create(placement, training=groups),
        )
    messages.append(str(caught.value))
    actor = build_actor(Case(train=(2, 1, 1), generate=1), PRE_LN, torch.float32, groups=groups)
    addresses = {name: value.data_ptr() for name, value in actor.model.named_parameters()}
    resharder = Resharder(actor.arena, actor.groups)
    for _ in range(3):
        resharder.gather()
        weights = {name: value.data_ptr() for name, value in actor.arena.weights().items()}
        actor.arena.weights_changed()
        resharder.gather()
        assert weights == {name: value.data_ptr() for name, value in actor.arena.weights().items()}
        actor.arena.release()
    assert addresses == {name: value.data_ptr() for name, value in actor.model.named_parameters()}
    return messages


def test_models_and_groups_of_another_plan_are_refused_and_addresses_stay() -> None:
    for messages in run_ranks(2, _adopt_others):
        assert "28 parameters here and the plan for rank" in messages[0]
        assert "is torch.bfloat16, the weight arena holds torch.float32" in messages[1]
        assert "build both from one plan" in messages[2]
