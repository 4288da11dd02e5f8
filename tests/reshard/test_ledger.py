"""The predicted memory of an arena, against pages counted by the system and one by one."""

import mmap

import pytest
import torch

from megachat.model.config import OPT_MODELS, OptConfig
from megachat.parallel.layout import ParallelLayout
from megachat.parallel.memory import AddressStableBuffer
from megachat.reshard import plan_for_model, plan_rank
from megachat.reshard.arena import WeightArena
from megachat.reshard.ledger import ArenaPhase, ArenaPool, arena_ledger

CONFIG = OptConfig(
    vocab_size=1000, max_positions=64, hidden=128, ffn=512, layers=4, heads=8, embed_dim=128
)
PAGE = mmap.PAGESIZE


@pytest.mark.parametrize(("train", "generate"), [((2, 2, 1), 1), ((4, 1, 2), 2), ((1, 2, 2), 4)])
def test_resident_pages_are_those_of_the_ledger(train: tuple[int, int, int], generate: int) -> None:
    tensor, pipeline, data = train
    source = ParallelLayout(tensor=tensor, pipeline=pipeline, data=data)
    target = ParallelLayout(tensor=generate, data=source.world_size // generate)
    plan = plan_for_model(CONFIG, source=source, target=target, element_bytes=4)
    for rank in range(source.world_size):
        part = plan_rank(plan, rank)
        memory = AddressStableBuffer(part.elements * 4, torch.device("cpu"))
        arena = WeightArena(
            plan,
            rank=rank,
            dtype=torch.float32,
            device=torch.device("cpu"),
            memory=lambda _, memory=memory: memory,
        )
        ledger = arena_ledger(part, element_bytes=4, page_bytes=PAGE)
        assert memory.resident_bytes() == 0
        memory.tensor().fill_(1)
        assert memory.resident_bytes() == ledger.peak(ArenaPhase.GENERATION)
        arena.release()
        assert memory.resident_bytes() == ledger.peak(ArenaPhase.TRAINING)
        for index in range(len(plan.blocks)):
            flat = arena.flat(index)
            if flat is not None:
                assert flat.view(torch.uint8).eq(1).all(), "released what is trained"


def test_growth_is_what_is_received_where_nothing_is_staged() -> None:
    """Up to a page at each end of each of the 76 blocks."""
    source = ParallelLayout(tensor=8, pipeline=8)
    plan = plan_for_model(
        OPT_MODELS["facebook/opt-175b"], source=source, target=ParallelLayout(tensor=8, data=8)
    )
    part = plan_rank(plan, 9)
    ledger = arena_ledger(part, element_bytes=2, page_bytes=PAGE)
    assert abs(ledger.growth - part.traffic.received) <= 2 * PAGE * len(plan.blocks)
    assert ledger.resident(ArenaPhase.RESHARD, ArenaPool.STAGING) == 0


def test_packed_pieces_count_in_the_reshard_alone() -> None:
    source = ParallelLayout(tensor=4, pipeline=4, data=4)
    plan = plan_for_model(
        OPT_MODELS["facebook/opt-66b"], source=source, target=ParallelLayout(tensor=8, data=8)
    )
    part = plan_rank(plan, 0)
    ledger = arena_ledger(part, element_bytes=2, page_bytes=PAGE)
    staging = [ledger.resident(phase, ArenaPool.STAGING) for phase in ArenaPhase]
    assert staging == [0, part.traffic.staged, 0]
    assert 0 < part.traffic.staged <= plan.bucket_bytes
    assert ledger.peak(ArenaPhase.RESHARD) > ledger.peak(ArenaPhase.GENERATION)
