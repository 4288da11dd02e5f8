from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megachat.parallel import collectives
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout
from tests.harness import run_ranks


def _every_collective() -> dict[str, Any]:
    """On the pipeline groups of TP2xPP2: ranks (0, 2) and (1, 3), so no index is a global rank."""
    group = ProcessGroups.create(ParallelLayout(tensor=2, pipeline=2)).pipeline
    rank = dist.get_rank()
    base = torch.arange(6.0).view(2, 3) + 10 * rank
    summed, largest, received = base.clone(), -base, base.clone()
    results: dict[str, Any] = {
        "sum": collectives.all_reduce_sum(summed, group),
        "max": collectives.all_reduce_max(largest, group),
        "rows": collectives.all_gather_rows(base.t(), group),
        "last": collectives.all_gather_last_dim(base.t(), group),
        "broadcast": collectives.broadcast(received, group, source=1),
        "in place": (
            torch.equal(summed, collectives.all_reduce_max(summed.clone(), group))
            and received.data_ptr() != base.data_ptr()
        ),
        "object": collectives.broadcast_object({"rank": rank}, group, source=1),
        "from world": collectives.broadcast_object(rank if rank == 2 else None, source=2),
        "nothing": collectives.broadcast_object(None, group),
        "objects": list(collectives.all_gather_objects(rank or None, group)),
        "of world": list(collectives.all_gather_objects(str(rank))),
    }
    collectives.barrier(group)
    collectives.barrier()
    return results


def test_each_collective_works_on_its_own_group_only() -> None:
    for rank, found in enumerate(run_ranks(4, _every_collective)):
        one, two = (
            torch.arange(6.0).view(2, 3) + 10 * member for member in (rank % 2, rank % 2 + 2)
        )
        for name, expected in {
            "sum": one + two,
            "max": -one,
            "rows": torch.cat([one.t(), two.t()]),
            "last": torch.cat([one.t(), two.t()], dim=1),
            "broadcast": two,
        }.items():
            assert torch.equal(found[name], expected), name
        assert found["in place"]
        assert found["object"] == {"rank": rank % 2 + 2}
        assert found["from world"] == 2
        assert found["nothing"] is None
        assert found["objects"] == [rank % 2 or None, rank % 2 + 2]
        assert found["of world"] == ["0", "1", "2", "3"]


def _alone() -> list[bool]:
    """A group of one: the same tensors come back, nothing is sent."""
    group = ProcessGroups.create(ParallelLayout()).single
    tensor = torch.arange(4.0)
    same: list[Tensor] = [
        collectives.all_reduce_sum(tensor, group),
        collectives.all_reduce_max(tensor, group),
        collectives.all_gather_rows(tensor, group),
        collectives.all_gather_last_dim(tensor, group),
        collectives.broadcast(tensor, group, source=0),
    ]
    pending = collectives.start_reduce_scatter(tensor, group)
    pending.wait()
    assert pending.transfer.received_bytes == pending.staged_bytes == 0
    thing = object()
    return [
        *(each is tensor for each in same),
        torch.equal(tensor, torch.arange(4.0)),
        collectives.broadcast_object(thing, group) is thing,
        list(collectives.all_gather_objects(7, group)) == [7],
    ]


def test_a_group_of_one_leaves_everything_as_it_is() -> None:
    assert all(run_ranks(1, _alone)[0])


def _sum_parts(dtype: torch.dtype) -> tuple[Tensor, Tensor, int, int]:
    """What every rank had, this rank's sum of its part, the bytes it got, its extra memory."""
    groups = ProcessGroups.create(ParallelLayout(tensor=2, data=dist.get_world_size() // 2))
    group, random = groups.data, torch.Generator().manual_seed(dist.get_rank())
    whole = torch.randn(group.size() * 1000, generator=random).to(dtype)
    before = collectives.all_gather_rows(whole[None], group)
    pending = collectives.start_reduce_scatter(whole, group)
    staged = pending.staged_bytes
    pending.wait()
    own = whole.chunk(group.size())[group.rank()]
    assert pending.own.data_ptr() == own.data_ptr()
    return before, own, pending.transfer.received_bytes, staged


def test_a_reduce_scatter_adds_in_group_order_and_brings_each_rank_its_part_only() -> None:
    """On ranks (0, 2, 4, 6) and (1, 3, 5, 7): the order shows in the last bits of fp32 sums."""
    for rank, (before, own, received, staged) in enumerate(run_ranks(8, _sum_parts, torch.float32)):
        part = slice(1000 * (rank // 2), 1000 * (rank // 2 + 1))
        expected = before[0, part]
        for other in before[1:, part]:
            expected = expected + other
        backwards = before[3, part]
        for other in before.flip(0)[1:, part]:
            backwards = backwards + other
        assert torch.equal(own, expected)
        assert not torch.equal(own, backwards)
        assert received == staged == 3 * 1000 * 4
