"""Counts by hand, and the groups that production code creates."""

import pytest
from hypothesis import given, settings

from megachat.parallel.layout import Axis, GenerationPlacement, ParallelLayout
from megachat.planner.communicators import Communicator, Use, communicator_bytes, communicators
from megachat.planner.job import Job
from tests.planner.jobs import jobs

MIB = 2**20


def layout(tensor: int, pipeline: int, data: int) -> ParallelLayout:
    return ParallelLayout(tensor=tensor, pipeline=pipeline, data=data)


@pytest.mark.parametrize(
    ("ranks", "use", "peers", "mib"),
    [
        # 24 channels of 10 + 2 MiB: a ring, or a ring and a tree with a rank above and one below.
        (range(8), Use.GATHER, (), 24 * 12),
        (range(8), Use.SUM, (), 24 * 12 * 3),
        (range(2), Use.SUM, (), 24 * 12 * 2),
        # Two channels through the own network card, 20 MiB a connection; up, two down and a ring.
        (range(0, 64, 8), Use.GATHER, (), 2 * 20),
        (range(0, 64, 8), Use.SUM, (), 2 * 20 * 4),
        # 16 channels, 14 of which leave the node elsewhere.
        (range(64), Use.SUM, (), 14 * 12 * 3 + 2 * 20 * 4),
        # Sending and receiving: 32 channels a neighbour inside, 2 across.
        (range(4), Use.GATHER, (1,), 24 * 12 + 32 * 12),
        (range(0, 64, 8), Use.GATHER, (8, 16), 2 * 20 + 2 * 2 * 20),
    ],
)
def test_buffers_of_a_group_are_those_of_its_connections(
    ranks: range, use: Use, peers: tuple[int, ...], mib: int
) -> None:
    group = Communicator(name="a group", ranks=tuple(ranks), use=use, peers=peers)
    assert group.buffer_bytes(0, ranks_per_node=8) == mib * MIB


def test_an_all_to_all_takes_what_was_reported_of_one() -> None:
    """NVIDIA/nccl issue 1685: 3.28 GB for 8 H100; a rank has connections to itself too."""
    group = Communicator(name="all", ranks=tuple(range(8)), use=Use.GATHER, peers=tuple(range(8)))
    rings = 24 * 12 * MIB
    taken = group.buffer_bytes(0, ranks_per_node=8) - rings
    assert taken == pytest.approx(3.28e9, rel=0.03)


def test_opt_175b_on_64_gpus_is_counted_by_hand() -> None:
    """TP8 x PP8 trains, TP8 generates, the critic is cut over 64 data ranks.

    Groups of the same ranks are one: the world, the critic's data and the actor's model ranks; the
    tensor ranks of both layouts; stages, replicas and who gathers.
    """
    world = 14 * 12 * 3 + 2 * 20 * 4
    tensor = 24 * 12 * 3
    stages = 2 * 20 + 2 * 20  # a ring, and the next stage
    ends = 2 * 20 * 4
    first_stage = world + tensor + stages + ends
    assert first_stage == 1768
    found = communicator_bytes(layout(8, 8, 1), layout(1, 1, 64), 8, ranks_per_node=8)
    assert found == first_stage * MIB


def test_one_rank_needs_no_communicator() -> None:
    assert communicators(layout(1, 1, 1), layout(1, 1, 1), 1, rank=0) == ()
    assert communicator_bytes(layout(1, 1, 1), layout(1, 1, 1), 1, ranks_per_node=8) == 0


def test_groups_of_the_same_ranks_are_one() -> None:
    """(0, 1), (0, 2), (0, 4), (0, 1, 4, 5), (0, 2, 4, 6), all; tp4.pp1.dp2 adds (0, 1, 2, 3)."""
    same = communicators(layout(2, 2, 2), layout(2, 2, 2), 2, rank=0)
    other = communicators(layout(2, 2, 2), layout(4, 1, 2), 2, rank=0)
    assert {group.ranks for group in other} - {group.ranks for group in same} == {range(4)}
    assert len(same) == len({group.ranks for group in same}) == 6


def test_stages_that_exchange_weights_have_connections_to_each_other() -> None:
    """A generation degree above the training degree sends slices between all stages."""

    def peers(generate: int) -> set[int]:
        found = communicators(layout(2, 4, 1), layout(2, 4, 1), generate, rank=2)
        return set(next(group.peers for group in found if group.peers))

    assert peers(2) == {0, 4}
    assert peers(4) == {0, 4, 6}


@settings(deadline=None, max_examples=60)
@given(jobs())
def test_groups_are_those_that_the_layouts_make(job: Job) -> None:
    actor, degree = job.actor.layout, job.generation_tensor
    placement = GenerationPlacement(source=actor, tensor=degree)
    for rank in {0, actor.world_size // 2, actor.world_size - 1}:
        found = communicators(actor, job.critic.layout, degree, rank=rank)
        assert all(rank in group.ranks and len(group.ranks) > 1 for group in found)
        ranks = [set(group.ranks) for group in found]
        expected = [
            *(actor.ranks_along(axis, rank) for axis in Axis),
            next(group for group in actor.model_groups() if rank in group),
            placement.tensor_group(rank),
            placement.replica_group(rank),
            placement.tile_group(rank),
            placement.gather_group(rank),
        ]
        assert all(set(group) in ranks for group in expected if len(group) > 1)
