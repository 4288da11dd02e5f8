"""Plans which parameters share a flat buffer, the unit in which gradients are reduced."""

import math
from collections.abc import Iterable

from megachat.model.config import Head, OptConfig
from megachat.model.opt import OptModel
from megachat.model.specs import TensorSpec, stage_specs
from megachat.parallel.layout import ParallelLayout

BUFFER_ELEMENTS = 2**24
"""Elements of a flat buffer at which the next one begins: 64 MiB of fp32 gradients. A buffer is
what one call reduces or gathers; large enough for the full speed of a network, and small enough
that the last of them, for which no backward pass is left to hide behind, is soon over."""


def buffers_of(model: OptModel) -> list[list[str]]:
    """Parameter names for each flat buffer of this rank; in a buffer they are in model order."""
    names = {spec.name: name for name, spec in model.local_specs().items()}
    place = {name: index for index, name in enumerate(model.local_specs())}
    planned = plan_buffers(
        model.config,
        head=model.head,
        layout=model.groups.layout,
        stage=model.groups.coordinate.pipeline,
        vocab_multiple=model.options.vocab_multiple,
    )
    return [sorted((names[spec] for spec in part), key=place.__getitem__) for part in planned]


def plan_buffers(
    config: OptConfig, *, head: Head, layout: ParallelLayout, stage: int, vocab_multiple: int = 1
) -> list[list[str]]:
    """Specification names for each flat buffer of one pipeline stage (pure).

    Neighbours in the model share a buffer if all of them decay or none does. Stages need equally
    many buffers, since they sum the norms of them one by one: where one has fewer, the rest are
    empty. One data rank has nothing to reduce, and takes a buffer of each kind.

    Args:
        config: The architecture.
        head: What the model computes.
        layout: How it is cut.
        stage: Whose buffers are asked for.
        vocab_multiple: `ModelOptions.vocab_multiple` of the model.
    """
    limit = BUFFER_ELEMENTS if layout.data > 1 else math.inf
    stages = [
        stage_specs(
            config,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            stage=number,
            head=head,
            vocab_multiple=vocab_multiple,
        )
        for number in range(layout.pipeline)
    ]
    buffers: list[list[str]] = []
    for decays in (True, False):
        cuts = [
            _cut((spec for spec in specs if spec.decays is decays), layout.tensor, limit)
            for specs in stages
        ]
        missing = max(map(len, cuts)) - len(cuts[stage])
        buffers += cuts[stage] + [[] for _ in range(missing)]
    return buffers


def _cut(specs: Iterable[TensorSpec], tensor: int, limit: float) -> list[list[str]]:
    """Names one after the other, a new buffer wherever the last one has reached the limit."""
    buffers: list[list[str]] = [[]]
    size = 0
    for spec in specs:
        if size >= limit:
            buffers.append([])
            size = 0
        buffers[-1].append(spec.name)
        size += math.prod(spec.local_shape(tensor))
    return buffers
