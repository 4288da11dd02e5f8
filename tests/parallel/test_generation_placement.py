"""Who generates what, and the groups of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.errors import LayoutError
from megachat.parallel.layout import Axis, GenerationPlacement, ParallelLayout


@st.composite
def placements(draw: st.DrawFn) -> GenerationPlacement:
    source = ParallelLayout(
        tensor=draw(st.sampled_from([1, 2, 3, 4, 8])),
        pipeline=draw(st.integers(1, 4)),
        data=draw(st.integers(1, 4)),
    )
    degree = draw(st.sampled_from(GenerationPlacement.legal_degrees(source)))
    return GenerationPlacement(source=source, tensor=degree)


@settings(deadline=None)
@given(placements())
def test_every_rank_is_in_one_replica_at_its_own_position(placement: GenerationPlacement) -> None:
    world = range(placement.source.world_size)
    assert placement.replicas * placement.tensor == len(world)
    assert {placement.replica(rank) for rank in world} == set(range(placement.replicas))
    for rank in world:
        group = placement.tensor_group(rank)
        assert group.index(rank) == placement.tensor_rank(rank)
        assert {placement.replica(member) for member in group} == {placement.replica(rank)}
        assert all(placement.tensor_group(member) == group for member in group)


@settings(deadline=None)
@given(placements())
def test_generation_shards_and_training_shards_nest(placement: GenerationPlacement) -> None:
    """As intervals of a dimension that is cut."""
    train = placement.source.tensor
    for rank in range(placement.source.world_size):
        own = placement.source.coordinate(rank).tensor
        start = placement.tensor_rank(rank) / placement.tensor
        stop = (placement.tensor_rank(rank) + 1) / placement.tensor
        if placement.splits == 1:
            assert start <= own / train and (own + 1) / train <= stop + 1e-12
        else:
            assert own / train <= start + 1e-12 and stop <= (own + 1) / train + 1e-12


@settings(deadline=None)
@given(placements())
def test_gather_groups_hold_each_tile_of_each_stage_once(placement: GenerationPlacement) -> None:
    source = placement.source
    if placement.splits > 1:
        return
    for rank in range(source.world_size):
        group = placement.gather_group(rank)
        assert rank in group
        assert list(group) == sorted(group)
        places = [(source.coordinate(r).pipeline, placement.tile(r)) for r in group]
        assert places == [(s, t) for s in range(source.pipeline) for t in range(placement.tiles)]
        assert len({placement.tensor_rank(member) for member in group}) == 1
        tiles = placement.tile_group(rank)
        assert set(tiles) <= set(group)
        assert {source.coordinate(r).pipeline for r in tiles} == {source.coordinate(rank).pipeline}
        assert set(source.ranks_along(Axis.PIPELINE, rank)) <= set(group)


def test_a_degree_that_does_not_nest_is_refused_with_its_neighbours() -> None:
    source = ParallelLayout(tensor=4, data=6)
    with pytest.raises(LayoutError, match=r"degree 6 does not fit .*tp4.pp1.dp6.*nearest: 4 or 8"):
        GenerationPlacement(source=source, tensor=6)
    with pytest.raises(LayoutError, match=r"degree 48 .*24 ranks .*nearest: 24$"):
        GenerationPlacement(source=source, tensor=48)
