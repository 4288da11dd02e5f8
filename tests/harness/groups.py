"""`groups_of`: the process groups of a layout, made once in a world."""

import functools

import torch.distributed as dist

from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout


def groups_of(layout: ParallelLayout) -> ProcessGroups:
    """Groups that tests of this process share: each has threads of its own, on every rank."""
    return _groups_of(layout, dist.group.WORLD)


@functools.cache
def _groups_of(layout: ParallelLayout, world: dist.ProcessGroup | None) -> ProcessGroups:
    return ProcessGroups.create(layout)
