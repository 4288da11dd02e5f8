"""The one place that calls torch.distributed collectives.

Every function is a no-op for a group of one rank, works in place where it says so, and takes the
group as an argument. `source` is an index within the group, not a global rank.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

ObjectT = TypeVar("ObjectT")


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sums `tensor` over the group, in place, and returns it."""
    if group.size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def all_reduce_max(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Takes the element-wise maximum over the group, in place, and returns it."""
    if group.size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def all_gather_rows(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenates the group's equally shaped tensors along dim 0, in group order."""
    if group.size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


def all_gather_last_dim(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenates the group's equally shaped tensors along the last dim, in group order."""
    if group.size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def broadcast(tensor: Tensor, group: dist.ProcessGroup, *, source: int) -> Tensor:
    """Overwrites `tensor` with the source's, in place, and returns it."""
    if group.size() > 1:
        dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)
    return tensor


def broadcast_object(
    value: ObjectT | None, group: dist.ProcessGroup | None = None, *, source: int = 0
) -> ObjectT:
    """Returns the source's picklable `value` on every rank (None as the group means the world).

    Only for objects that this job's own ranks made: the transport is pickle.
    """
    world = group if group is not None else dist.group.WORLD
    assert world is not None
    if world.size() == 1:
        assert value is not None
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(world, source), group=world)
    received = box[0]
    assert received is not None
    return received


def all_gather_objects(value: ObjectT, group: dist.ProcessGroup | None = None) -> Sequence[ObjectT]:
    """Every rank's picklable `value`, in group order (None as the group means the world)."""
    world = group if group is not None else dist.group.WORLD
    assert world is not None
    values: list[ObjectT | None] = [None] * world.size()
    dist.all_gather_object(values, value, group=world)
    return [item for item in values if item is not None]


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Waits until every rank of the group (None: of the world) has arrived."""
    dist.barrier(group=group)
