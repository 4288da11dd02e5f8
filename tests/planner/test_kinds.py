"""Kinds of ranks against a walk over every rank."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.parallel.layout import ParallelLayout, divisors
from megachat.planner.kinds import node_kinds, rank_kinds


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[ParallelLayout, ParallelLayout, int]:
    """Two layouts over the same ranks, and GPUs in a node, which need not divide anything."""
    world = draw(st.sampled_from((1, 6, 8, 24, 36, 48)))

    def layout() -> ParallelLayout:
        pipeline = draw(st.sampled_from(divisors(world)))
        tensor = draw(st.sampled_from(divisors(world // pipeline)))
        return ParallelLayout.for_world(world, tensor=tensor, pipeline=pipeline)

    return layout(), layout(), draw(st.sampled_from((1, 2, 3, 4, 8, 48)))


@given(_pairs())
@settings(deadline=None, max_examples=80)
def test_kinds_are_those_of_a_walk_over_all_ranks(
    case: tuple[ParallelLayout, ParallelLayout, int],
) -> None:
    actor, critic, gpus = case
    ranks: dict[tuple[int, int], list[int]] = {}
    nodes: dict[int, Counter[tuple[int, int]]] = {}
    for rank in range(actor.world_size):
        kind = actor.coordinate(rank).pipeline, critic.coordinate(rank).pipeline
        ranks.setdefault(kind, []).append(rank)
        nodes.setdefault(rank // gpus, Counter())[kind] += 1
    found = rank_kinds(actor, critic)
    assert {kind: list(members) for kind, members in found.items()} == ranks
    mixtures = {tuple(sorted(node.items())) for node in nodes.values()}
    assert {tuple(sorted(node)) for node in node_kinds(actor, critic, gpus)} == mixtures
