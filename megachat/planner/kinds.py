"""Groups ranks that hold the same: by their stages, and by node. Pure.

A plan is made for each kind of rank, so that thousands of ranks cost as much as a few.
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache

from megachat.parallel.layout import ParallelLayout


@lru_cache(maxsize=256)
def rank_kinds(actor: ParallelLayout, critic: ParallelLayout) -> Mapping[tuple[int, int], range]:
    """(actor stage, critic stage) -> the ranks at both.

    Ranks of a stage follow each other, and so do those at a stage of each model.
    """
    world = actor.world_size
    starts = sorted(
        {start for layout in (actor, critic) for start in range(0, world, _stage_ranks(layout))}
    )
    return {
        (start // _stage_ranks(actor), start // _stage_ranks(critic)): range(start, end)
        for start, end in zip(starts, [*starts[1:], world], strict=True)
    }


def _stage_ranks(layout: ParallelLayout) -> int:
    """Ranks of a pipeline stage."""
    return layout.world_size // layout.pipeline


@lru_cache(maxsize=256)
def node_kinds(
    actor: ParallelLayout, critic: ParallelLayout, gpus_per_node: int
) -> tuple[tuple[tuple[tuple[int, int], int], ...], ...]:
    """What the nodes of a job hold, each different mixture once: kinds of ranks and their number.

    Of the nodes that ranks of one kind fill, one stands for all.
    """
    nodes: dict[int, list[tuple[tuple[int, int], int]]] = defaultdict(list)
    for kind, ranks in rank_kinds(actor, critic).items():
        first, last = ranks[0] // gpus_per_node, ranks[-1] // gpus_per_node
        for node in sorted({first, min(first + 1, last), last}):
            begin = max(ranks[0], node * gpus_per_node)
            end = min(ranks[-1] + 1, (node + 1) * gpus_per_node)
            nodes[node].append((kind, end - begin))
    return tuple(dict.fromkeys(tuple(members) for members in nodes.values()))
