import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from megachat.errors import LayoutError
from megachat.parallel.layout import Axis, ParallelLayout

LAYOUTS = st.builds(
    ParallelLayout,
    tensor=st.integers(1, 8),
    pipeline=st.integers(1, 6),
    data=st.integers(1, 5),
)


@given(LAYOUTS)
@settings(deadline=None)
def test_ranks_and_coordinates_name_each_other(layout: ParallelLayout) -> None:
    coordinates = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert len(set(coordinates)) == layout.world_size
    assert [layout.rank_of(coordinate) for coordinate in coordinates] == list(
        range(layout.world_size)
    )
    for axis in Axis:
        assert {each.along(axis) for each in coordinates} == set(range(layout.degree(axis)))


@given(LAYOUTS)
@settings(deadline=None)
def test_groups_equal_those_of_megatron(layout: ParallelLayout) -> None:
    megatron = RankGenerator(
        tp=layout.tensor,
        ep=1,
        dp=layout.data,
        pp=layout.pipeline,
        cp=1,
        order="tp-cp-ep-dp-pp",
    )
    for axis, name in ((Axis.TENSOR, "tp"), (Axis.DATA, "dp"), (Axis.PIPELINE, "pp")):
        ours = [list(group) for group in layout.groups_along(axis)]
        assert ours == sorted(megatron.get_ranks(name)), axis
    ours = [list(group) for group in layout.model_groups()]
    assert ours == sorted(sorted(group) for group in megatron.get_ranks("tp-pp"))


@given(LAYOUTS, st.sampled_from(Axis))
@settings(deadline=None)
def test_groups_along_an_axis_partition_the_world(layout: ParallelLayout, axis: Axis) -> None:
    groups = layout.groups_along(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for group in groups:
        assert len(group) == layout.degree(axis)
        here = layout.coordinate(group[0])
        for position, rank in enumerate(group):
            assert layout.ranks_along(axis, rank) == group
            other = layout.coordinate(rank)
            assert other.along(axis) == position
            assert all(other.along(each) == here.along(each) for each in Axis if each != axis)


@given(LAYOUTS)
@settings(deadline=None)
def test_model_groups_hold_one_rank_of_every_stage_and_shard(layout: ParallelLayout) -> None:
    groups = layout.model_groups()
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for group in groups:
        places = {
            (layout.coordinate(rank).tensor, layout.coordinate(rank).pipeline) for rank in group
        }
        assert len(places) == len(group) == layout.tensor * layout.pipeline


@given(LAYOUTS)
@settings(deadline=None)
def test_embedding_groups_join_first_and_last_stage(layout: ParallelLayout) -> None:
    groups = layout.embedding_groups()
    assert len(groups) == layout.tensor * layout.data
    for group in groups:
        assert len(group) == min(2, layout.pipeline)
        assert layout.is_first_stage(group[0])
        assert layout.is_last_stage(group[-1])
        assert {group[0], group[-1]} <= set(layout.ranks_along(Axis.PIPELINE, group[0]))
    first = [rank for rank in range(layout.world_size) if layout.is_first_stage(rank)]
    assert sorted(group[0] for group in groups) == first


@given(LAYOUTS)
@settings(deadline=None)
def test_data_degree_follows_from_the_world(layout: ParallelLayout) -> None:
    assert (
        ParallelLayout.for_world(layout.world_size, tensor=layout.tensor, pipeline=layout.pipeline)
        == layout
    )


def test_tensor_ranks_are_neighbours_and_stages_farthest_apart() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    assert layout.groups_along(Axis.TENSOR) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups_along(Axis.DATA) == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.groups_along(Axis.PIPELINE) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.model_groups() == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert str(layout) == "tp2.pp2.dp2"


@pytest.mark.parametrize("degrees", [{"tensor": 0}, {"pipeline": -1}, {"data": 0}])
def test_a_degree_below_one_is_refused(degrees: dict[str, int]) -> None:
    with pytest.raises(LayoutError, match="at least 1"):
        ParallelLayout(**degrees)


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline"), [(8, 3, 1), (4, 2, 4), (1, 2, 1), (8, 0, 2)]
)
def test_a_world_that_does_not_fit_names_both_sides(world: int, tensor: int, pipeline: int) -> None:
    message = f"world size {world} .* tensor {tensor} x pipeline {pipeline} = {tensor * pipeline}"
    with pytest.raises(LayoutError, match=message):
        ParallelLayout.for_world(world, tensor=tensor, pipeline=pipeline)


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_names_rank_and_layout(rank: int) -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    with pytest.raises(LayoutError, match=f"rank {rank} .*tp2.pp2.dp2 of 8 ranks"):
        layout.coordinate(rank)
