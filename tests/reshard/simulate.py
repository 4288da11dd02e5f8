"""A reshard on arrays: all ranks' plans executed in one process, every write counted."""

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from megachat.model.specs import TensorSpec
from megachat.parallel.layout import Axis
from megachat.reshard import RankPlan, ReshardPlan, plan_rank
from megachat.reshard.records import Gather, Scope, View

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Arena:
    """One rank's elements, as numbers of elements of the whole model."""

    part: RankPlan
    values: Ints
    """-1 where nothing was written."""
    writes: Ints
    """How often each was received."""

    def at(self, view: View) -> Ints:
        return _strided(self.values, view)

    def receive(self, view: View, values: Ints) -> None:
        _strided(self.values, view)[...] = values
        _strided(self.writes, view)[...] += 1


def whole_tensors(specs: tuple[TensorSpec, ...]) -> dict[str, Ints]:
    """Each parameter filled with the numbers of its elements in the model."""
    wholes, start = {}, 0
    for spec in specs:
        wholes[spec.name] = np.arange(start, start + prod(spec.shape)).reshape(spec.shape)
        start += prod(spec.shape)
    return wholes


def run(plan: ReshardPlan, specs: tuple[TensorSpec, ...]) -> list[Arena]:
    """Fills the training shards of all ranks and executes their transfers."""
    wholes = whole_tensors(specs)
    by_name = {spec.name: spec for spec in specs}
    arenas = []
    for rank in range(plan.source.world_size):
        part = plan_rank(plan, rank)
        arena = Arena(part, np.full(part.elements, -1), np.zeros(part.elements, dtype=np.int64))
        tensor = plan.source.coordinate(rank).tensor
        for flat in part.flats:
            at = flat.offset
            for name in flat.names:
                spec = by_name[name]
                shard = wholes[name][spec.slices(tensor, tensor=plan.source.tensor)]
                arena.values[at : at + shard.size] = shard.ravel()
                at += shard.size
        arenas.append(arena)
    for number in range(len(plan.blocks)):
        _run_step(plan, arenas, number)
    return arenas


def _run_step(plan: ReshardPlan, arenas: list[Arena], number: int) -> None:
    steps = [arena.part.steps[number] for arena in arenas]
    assert len({len(step.transfers) for step in steps}) == 1, "ranks disagree on transfers"
    for transfers in zip(*(step.transfers for step in steps), strict=True):
        before = [arena.values.copy() for arena in arenas]
        for rank, transfer in enumerate(transfers):
            if isinstance(transfer, Gather):
                members = _members(plan, transfer.scope, rank)
                for index, member in enumerate(members):
                    if member != rank:
                        theirs = transfers[member]
                        assert isinstance(theirs, Gather)
                        values = _strided(before[member], theirs.slots[index])
                        arenas[rank].receive(transfer.slots[index], values)
                continue
            stages = plan.source.ranks_along(Axis.PIPELINE, rank)
            own_stage = stages.index(rank)
            for stage in {piece.stage for piece in transfer.receives}:
                theirs = transfers[stages[stage]]
                assert not isinstance(theirs, Gather)
                sent = [piece for piece in theirs.sends if piece.stage == own_stage]
                wanted = [piece for piece in transfer.receives if piece.stage == stage]
                for source, sink in zip(sent, wanted, strict=True):  # in the order of listing
                    assert sink.view.is_contiguous
                    values = _strided(before[stages[stage]], source.view)
                    arenas[rank].receive(sink.view, values.reshape(sink.view.shape))


def _members(plan: ReshardPlan, scope: Scope, rank: int) -> tuple[int, ...]:
    if scope is Scope.PIPELINE:
        return plan.source.ranks_along(Axis.PIPELINE, rank)
    if scope is Scope.TILES:
        return plan.placement.tile_group(rank)
    return plan.placement.gather_group(rank)


def _strided(values: Ints, view: View) -> Ints:
    strides = tuple(stride * values.itemsize for stride in view.strides)
    return np.lib.stride_tricks.as_strided(values[view.offset :], view.shape, strides)
