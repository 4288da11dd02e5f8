"""Computes the long-lived pools of a model on one rank, and what the allocator adds. Pure.

For n parameters on the rank and data degree d:

| precision | weights | gradients | masters | moments |
|---|---|---|---|---|
| bf16 | 2 n | 4 n | 4 n / d | 8 n / d |
| fp32 | 4 n | 4 n | 4 n / d | 8 n / d |

Either way *every* data rank accumulates the whole shard's gradients in flat fp32 buffers, which are
reduced in place: the own part of the sums has no copy. With bf16 the buffers stay between steps,
with fp32 they live from the first backward pass of a step to its update, and are planned at that
moment. Models that only run forward have weights alone.
"""

from functools import cache

from megachat.planner.allocator import PARTLY_USED_BYTES, rounding
from megachat.planner.job import Role, RoleSetup
from megachat.planner.records import Pool, PoolBytes, Residence
from megachat.planner.sizes import stage_elements, stage_tensors

_MASTER_BYTES, _MOMENT_BYTES, GRADIENT_BYTES = 4, 8, 4
"""Bytes per parameter; always fp32."""


def trained_bytes(setup: RoleSetup) -> int:
    """Bytes of the long-lived pools of a model that trains, on its fullest stage."""
    return max(
        sum(item.num_bytes for item in trained_pools(Role.CRITIC, setup, stage))
        for stage in range(setup.layout.pipeline)
    )


@cache
def weights_of(role: Role, setup: RoleSetup, stage: int) -> tuple[PoolBytes, ...]:
    """Pools of a model that only runs forward."""
    elements = stage_elements(setup, stage=stage)
    return (
        on_device(role, Pool.WEIGHTS, elements.layers * setup.value_bytes),
        on_device(role, Pool.EMBEDDINGS, elements.embeddings * setup.value_bytes),
    )


@cache
def trained_pools(role: Role, setup: RoleSetup, stage: int) -> tuple[PoolBytes, ...]:
    """Long-lived pools of a model that trains."""
    elements = stage_elements(setup, stage=stage).total
    share = -(-elements // setup.layout.data)
    return (
        *weights_of(role, setup, stage),
        on_device(role, Pool.GRADIENTS, elements * GRADIENT_BYTES),
        on_device(role, Pool.MASTERS, share * _MASTER_BYTES),
        on_device(role, Pool.MOMENTS, share * _MOMENT_BYTES),
    )


@cache
def held_rounding(setup: RoleSetup, stage: int) -> int:
    """Of a model that trains: weights, gradients, masters and two moments.

    The optimizer's buffers hold a parameter each or several; each alone rounds to more.
    """
    data = setup.layout.data

    def beyond(elements: int) -> int:
        share = -(-elements // data)
        return rounding(
            (elements * GRADIENT_BYTES, share * _MASTER_BYTES, *[share * _MOMENT_BYTES // 2] * 2)
        )

    tensors = stage_tensors(setup, stage=stage)
    state = tensors.num_layers * sum(map(beyond, tensors.layer)) + sum(map(beyond, tensors.edges))
    return weight_rounding(setup, stage) + state


@cache
def weight_rounding(setup: RoleSetup, stage: int) -> int:
    """Of the weights of a model, each parameter a tensor, with the segments that are not full."""
    tensors = stage_tensors(setup, stage=stage)
    layer, edges = (
        rounding(elements * setup.value_bytes for elements in part)
        for part in (tensors.layer, tensors.edges)
    )
    return tensors.num_layers * layer + edges + PARTLY_USED_BYTES


def on_device(role: Role, pool: Pool, num_bytes: int) -> PoolBytes:
    """A pool in a GPU's memory."""
    return PoolBytes(role=role, pool=pool, residence=Residence.DEVICE, num_bytes=num_bytes)


def moved(item: PoolBytes, residence: Residence, num_bytes: int) -> PoolBytes:
    """So many bytes of a pool somewhere else."""
    return PoolBytes(role=item.role, pool=item.pool, residence=residence, num_bytes=num_bytes)
