"""The one place that calls torch.distributed collectives.

Every function is a no-op for a group of one rank, works in place where it says so, and takes the
group as an argument. `source` is an index within the group, not a global rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

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
    return _all_gather(tensor, group, dim=0)


def all_gather_last_dim(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenates the group's equally shaped tensors along the last dim, in group order."""
    return _all_gather(tensor, group, dim=-1)


def _all_gather(tensor: Tensor, group: dist.ProcessGroup, *, dim: int) -> Tensor:
    if group.size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def broadcast(tensor: Tensor, group: dist.ProcessGroup, *, source: int) -> Tensor:
    """Overwrites `tensor` with the source's, in place, and returns it."""
    if group.size() > 1:
        dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)
    return tensor


def scatter(
    target: Tensor, pieces: Sequence[Tensor], group: dist.ProcessGroup, *, source: int
) -> Tensor:
    """Overwrites `target` with the source's piece for this rank, in place, and returns it.

    Args:
        target: Contiguous.
        pieces: On the source one contiguous tensor a rank of the group, like `target`; else empty.
        group: The ranks.
        source: Who has the pieces.
    """
    if group.size() == 1:
        return target.copy_(pieces[0])
    dist.scatter(target, list(pieces) or None, src=dist.get_global_rank(group, source), group=group)
    return target


def gather(
    tensor: Tensor, slots: Sequence[Tensor], group: dist.ProcessGroup, *, destination: int
) -> None:
    """Brings every rank's contiguous `tensor` to one rank of the group.

    Args:
        tensor: What this rank gives.
        slots: On the destination one contiguous tensor a rank of the group, overwritten; else
            empty.
        group: The ranks.
        destination: Who gets them, an index within the group.
    """
    if group.size() == 1:
        slots[0].copy_(tensor)
        return
    target = dist.get_global_rank(group, destination)
    dist.gather(tensor, list(slots) or None, dst=target, group=group)


def broadcast_object(
    value: ObjectT | None, group: dist.ProcessGroup | None = None, *, source: int = 0
) -> ObjectT:
    """Returns the source's picklable `value` on every rank (None as the group means the world).

    Only for objects that this job's own ranks made: the transport is pickle.
    """
    world = group if group is not None else dist.group.WORLD
    assert world is not None
    box = [value]
    if world.size() > 1:
        dist.broadcast_object_list(box, src=dist.get_global_rank(world, source), group=world)
    return cast(ObjectT, box[0])


def all_gather_objects(value: ObjectT, group: dist.ProcessGroup | None = None) -> Sequence[ObjectT]:
    """Every rank's picklable `value`, in group order (None as the group means the world)."""
    world = group if group is not None else dist.group.WORLD
    assert world is not None
    values: list[ObjectT] = [value] * world.size()
    dist.all_gather_object(values, value, group=world)
    return values


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingTransfer:
    """A transfer that was started; its tensors may not be touched before `wait`."""

    works: tuple[dist.Work, ...]
    received_bytes: int
    """Bytes that this rank gets from others, counted from the tensors handed over."""
    sources: tuple[Tensor, ...] = ()
    """Tensors being sent, kept alive until they are."""

    def wait(self) -> None:
        """Returns when the tensors may be used again (on CUDA: by the current stream).

        To be called once: gloo would wait for a second arrival.
        """
        for work in self.works:
            work.wait()


def start_gather(slots: Sequence[Tensor], group: dist.ProcessGroup) -> PendingTransfer:
    """Fills `slots` in place: slot i with what rank i of the group has in its own slot i.

    One all-gather where the backend does it in place (NCCL, neighbouring slots). Elsewhere each
    rank sends its slot to each other one: gloo's all-gather would stage a copy of the whole output,
    and its broadcasts pass through a pool of two threads.

    Args:
        slots: One contiguous tensor a rank of the group, of equal sizes.
        group: The ranks.
    """
    if group.size() == 1:
        return PendingTransfer(works=(), received_bytes=0)
    own = slots[group.rank()]
    if dist.get_backend(group) == "nccl" and _are_neighbours(slots):
        return start_all_gather(slots[0].as_strided((own.numel() * len(slots),), (1,)), group)
    # Everyone starts with another peer, so that no rank is sent everything at once.
    peers = [(group.rank() + distance) % group.size() for distance in range(1, group.size())]
    return start_exchange(
        sends=[(peer, own) for peer in peers],
        receives=[(peer, slots[peer]) for peer in reversed(peers)],
        group=group,
    )


def start_all_gather(whole: Tensor, group: dist.ProcessGroup) -> PendingTransfer:
    """Fills `whole` in place with one all-gather, whatever the backend makes of it.

    Args:
        whole: Contiguous; the i-th of equal parts is what rank i of the group has there.
        group: The ranks.
    """
    own = whole.view(-1).chunk(group.size())[group.rank()]
    work = dist.all_gather_single(whole.view(-1), own, group=group, async_op=True)
    return PendingTransfer(works=(work,), received_bytes=whole.nbytes - own.nbytes)


def start_exchange(
    *,
    sends: Sequence[tuple[int, Tensor]],
    receives: Sequence[tuple[int, Tensor]],
    group: dist.ProcessGroup,
) -> PendingTransfer:
    """Sends contiguous tensors to, and receives others in place from, ranks of the group.

    Between two ranks, tensors arrive in the order in which they are listed here.

    Args:
        sends: (rank within the group, tensor).
        receives: (rank within the group, tensor to overwrite).
        group: The ranks.
    """
    operations = [
        dist.P2POp(call, tensor, dist.get_global_rank(group, peer), group=group)
        for call, pairs in ((dist.isend, sends), (dist.irecv, receives))
        for peer, tensor in pairs
    ]
    works = dist.batch_isend_irecv(operations) if operations else []
    return PendingTransfer(
        works=tuple(works),
        received_bytes=sum(tensor.nbytes for _, tensor in receives),
        sources=tuple(tensor for _, tensor in sends),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingReduction:
    """A reduce-scatter that was started; its tensor may not be touched before `wait`."""

    transfer: PendingTransfer
    own: Tensor
    """This rank's part, the sum over the group after `wait`."""
    before: tuple[Tensor, ...] = ()
    """What ranks ahead of this one in the group add; none where the backend does the adding."""
    after: tuple[Tensor, ...] = ()
    """What the ranks behind it add."""

    @property
    def staged_bytes(self) -> int:
        """Memory beside the tensor itself, until `wait`."""
        return sum(part.nbytes for part in (*self.before, *self.after))

    def wait(self) -> None:
        """Returns when the sum stands in `own` (on CUDA: for the current stream); once."""
        self.transfer.wait()
        if self.before:
            total, *others = self.before
            for part in others:
                total.add_(part)
            self.own.add_(total)
        for part in self.after:
            self.own.add_(part)


def start_reduce_scatter(whole: Tensor, group: dist.ProcessGroup) -> PendingReduction:
    """Sums each of equal parts of `whole` over the group, in place, on the rank that owns it.

    The i-th part belongs to rank i of the group; what is left in the other parts is undefined.
    NCCL does it itself. gloo's reduce-scatter is an all-reduce of a copy, which moves twice the
    bytes, so elsewhere every rank sends each part to its owner, who adds them in group order:
    the same order for all elements, whoever owns them.

    Args:
        whole: Contiguous, a multiple of the group's size long.
        group: The ranks.
    """
    parts = whole.view(-1).chunk(group.size())
    rank = group.rank()
    own = parts[rank]
    if group.size() == 1:
        return PendingReduction(transfer=PendingTransfer(works=(), received_bytes=0), own=own)
    if dist.get_backend(group) == "nccl":
        work = dist.reduce_scatter_single(own, whole.view(-1), group=group, async_op=True)
        transfer = PendingTransfer(works=(work,), received_bytes=whole.nbytes - own.nbytes)
        return PendingReduction(transfer=transfer, own=own)
    # Everyone starts with another peer, so that no rank is sent everything at once.
    peers = [(rank + distance) % group.size() for distance in range(1, group.size())]
    staged = {peer: torch.empty_like(own) for peer in peers}
    transfer = start_exchange(
        sends=[(peer, parts[peer]) for peer in peers],
        receives=[(peer, staged[peer]) for peer in reversed(peers)],
        group=group,
    )
    return PendingReduction(
        transfer=transfer,
        own=own,
        before=tuple(staged[peer] for peer in range(rank)),
        after=tuple(staged[peer] for peer in range(rank + 1, group.size())),
    )


def _are_neighbours(slots: Sequence[Tensor]) -> bool:
    """Whether equal contiguous tensors lie one after the other in memory."""
    start, size = slots[0].data_ptr(), slots[0].nbytes
    return all(slot.data_ptr() == start + index * size for index, slot in enumerate(slots))


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Waits until every rank of the group (None: of the world) has arrived."""
    # NCCL's barrier is a sum on some device; before the first other sum it would guess which.
    is_nccl = dist.get_backend(group) == "nccl"
    dist.barrier(group=group, device_ids=[torch.cuda.current_device()] if is_nccl else None)
