"""Moves whole parameters between the rank that has them on the CPU and the ranks with a shard.

Everything goes over the groups that training has anyway: a tensor group cuts or joins the whole,
the data group brings a piece to the other copies of the model, the pipeline group a whole to the
stage that writes it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megachat.checkpoint.load_plan import piece_of
from megachat.model.specs import TensorSpec, stage_of
from megachat.parallel.collectives import broadcast, gather, scatter

if TYPE_CHECKING:  # megatron-core takes seconds to import, and folders are looked at without it
    from megachat.model.opt import OptModel


@torch.no_grad()
def deliver(model: "OptModel", spec: TensorSpec, whole: Tensor | None, *, source: int) -> None:
    """Fills the shards of one parameter; a call of all ranks of its first stage.

    Nothing but the shards themselves takes memory on the receiving ranks. The source holds one more
    copy of the parameter, in the model's dtype, where that or the tensor degree asks for one.

    Args:
        model: This rank's part; padding rows become zero.
        spec: The parameter, in this model.
        whole: On the source, without padding, in any dtype; else None.
        source: Data coordinate of the source; its tensor coordinate is 0.
    """
    groups = model.groups
    shard = model.parameters_by_spec()[spec.name].data
    if groups.coordinate.data == source:
        pieces = []
        if whole is not None:
            ranks = range(groups.layout.tensor)
            pieces = [_padded_piece(spec, whole, like=shard, rank=r, of=len(ranks)) for r in ranks]
        scatter(shard, pieces, groups.tensor, source=0)
    broadcast(shard, groups.data, source=source)


def _padded_piece(spec: TensorSpec, whole: Tensor, *, like: Tensor, rank: int, of: int) -> Tensor:
    """One rank's shard, where and as `like` is; a view of `whole` where that is possible."""
    piece = whole[piece_of(spec, rank, tensor=of)]
    if of == 1 and piece.shape == like.shape:
        return piece  # copied, and converted, straight into the parameter
    if piece.shape == like.shape:
        return piece.contiguous().to(device=like.device, dtype=like.dtype)
    padded = torch.zeros_like(like)
    padded[: piece.shape[0]].copy_(piece)
    return padded


def share_tied(model: "OptModel") -> None:
    """Brings the word embedding from the first stage to the last one's copy of it."""
    groups = model.groups
    if groups.layout.pipeline == 1 or not (groups.is_first_stage or groups.is_last_stage):
        return
    parameters = model.parameters_by_spec()
    for spec in model.global_specs():
        if spec.tied:
            broadcast(parameters[spec.name].data, groups.embedding, source=0)


@torch.no_grad()
def collect(
    model: "OptModel", spec: TensorSpec, *, stage: int, dtype: torch.dtype
) -> Tensor | None:
    """A whole parameter on the CPU of one rank: the first tensor rank of a stage.

    A call of all tensor ranks of the stage that holds the parameter; where that is another one than
    `stage`, of all ranks of this copy of the model.

    Args:
        model: This rank's part.
        spec: The parameter, in this model.
        stage: Who gets it.
        dtype: Converted to this.

    Returns:
        `spec.shape` in `dtype`, padding rows included; None on other ranks.
    """
    groups, here = model.groups, model.groups.coordinate
    owner = stage_of(spec, model.config, pipeline=groups.layout.pipeline)
    device = next(model.parameters()).device
    whole = None
    if here.tensor == 0 and (here.pipeline == owner or owner != stage):
        whole = torch.empty(spec.shape, dtype=dtype, device=device)
    if here.pipeline == owner:
        shard = model.parameters_by_spec()[spec.name].data
        _join(shard.to(dtype).contiguous(), spec, whole, model)
    if owner != stage and whole is not None:
        broadcast(whole, groups.pipeline, source=owner)
    return whole.cpu() if whole is not None and here.pipeline == stage else None


def _join(shard: Tensor, spec: TensorSpec, whole: Tensor | None, model: "OptModel") -> None:
    """Puts the shards of a tensor group together on its first rank."""
    group = model.groups.tensor
    if spec.shard_dim is None or group.size() == 1:
        if whole is not None:
            whole.copy_(shard)
        return
    if whole is None:
        gather(shard, [], group, destination=0)
        return
    places = whole.chunk(group.size(), dim=spec.shard_dim)
    # Rows of the whole are contiguous and received in place, columns are not.
    slots = places if spec.shard_dim == 0 else [torch.empty_like(shard) for _ in places]
    gather(shard, slots, group, destination=0)
    if spec.shard_dim != 0:
        for place, slot in zip(places, slots, strict=True):
            place.copy_(slot)
