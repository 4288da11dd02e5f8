"""Whole parameters, put together from the training shards of all ranks without any of our code."""

import torch
from torch import Tensor

from megachat.model.opt import OptModel
from megachat.parallel.collectives import all_gather_objects


@torch.no_grad()
def whole_weights(model: OptModel) -> dict[str, Tensor]:
    """All parameters by the names of the specification; a collective call of the whole world.

    Shards travel as arrays of bytes: pickling a tensor takes ten times as long.
    """
    specs = {spec.name: spec for spec in model.global_specs()}
    mine = [
        (name, model.local_slices(specs[name]), _bytes_of(parameter))
        for name, parameter in model.parameters_by_spec().items()
    ]
    dtype = model.options.dtype
    wholes = {name: torch.empty(spec.shape, dtype=dtype) for name, spec in specs.items()}
    for part in all_gather_objects(mine):
        for name, slices, shard in part:
            place = wholes[name][slices]
            place.copy_(torch.from_numpy(shard).view(dtype).view(place.shape))
    return wholes


def _bytes_of(tensor: Tensor) -> object:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
