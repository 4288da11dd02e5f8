"""Reduces gradients to the data rank that owns them, beginning while the backward pass runs.

Gradients lie in flat buffers. As soon as a buffer's last gradient is final, its reduce-scatter
starts; what is not final by the end of the backward passes follows then. Buffers go in an order
that is fixed beforehand, last layers first, since all data ranks must start the same collectives in
the same order whatever gradient came first on each of them.
"""

import weakref
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megachat.parallel.collectives import PendingReduction, start_reduce_scatter

_STAGED_BYTES = 2**28
"""What reductions may keep in memory of their own before the oldest one is waited for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnGradient:
    """The part of a parameter's gradient that this data rank owns."""

    parameter: nn.Parameter
    value: Tensor
    """[elements] view of the flat buffer."""


@dataclass(kw_only=True, slots=True)
class _Buffer:
    """One flat buffer and what it waits for."""

    parameters: Sequence[nn.Parameter]
    may_start_early: bool
    flat: Tensor | None = None
    missing: int = 0
    """Parameters whose gradients are not final yet."""
    is_sent: bool = False


@dataclass(kw_only=True, slots=True)
class _Step:
    """What is known while the gradients of one step are computed."""

    passes: int
    arrivals: dict[nn.Parameter, int] = field(default_factory=dict)
    num_sent: int = 0
    pending: deque[PendingReduction] = field(default_factory=deque)


class GradientReducer:
    """Sums flat gradient buffers over the data ranks, each part on its owner."""

    def __init__(
        self,
        buffers: Sequence[Sequence[nn.Parameter]],
        *,
        forward_order: Sequence[nn.Parameter],
        shared: Collection[nn.Parameter],
        group: dist.ProcessGroup,
    ) -> None:
        """Watches the parameters; holds no memory.

        Args:
            buffers: The parameters of each flat buffer, in the order of their gradients in it; a
                buffer without any is left alone.
            forward_order: All of them in the order in which a forward pass comes to them.
            shared: Those whose gradients are changed after the backward passes, which therefore
                cannot start early.
            group: The data ranks.
        """
        place = {parameter: index for index, parameter in enumerate(forward_order)}
        late = set(shared)
        self._group = group
        self._buffers = [
            _Buffer(parameters=parameters, may_start_early=not late.intersection(parameters))
            for parameters in buffers
        ]
        # A buffer is ready when the gradient of its foremost parameter is.
        self._order = sorted(
            (buffer for buffer in self._buffers if buffer.parameters),
            key=lambda buffer: (
                not buffer.may_start_early,
                -min(place[parameter] for parameter in buffer.parameters),
            ),
        )
        self._buffer_of = {p: buffer for buffer in self._buffers for p in buffer.parameters}
        self._step: _Step | None = None
        if group.size() > 1:
            # Hooks live as long as their parameter, which must not keep the buffers alive.
            hook = partial(_call, weakref.WeakMethod(self._note_arrival))
            for parameter in self._buffer_of:
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def begin(self, flats: Sequence[Tensor], *, passes: int) -> None:
        """Prepares for the gradients of one step.

        Args:
            flats: The flat buffers, one for each that was announced; a multiple of the group's size
                long.
            passes: Backward passes that each add to every gradient.
        """
        for buffer, flat in zip(self._buffers, flats, strict=True):
            buffer.flat, buffer.missing, buffer.is_sent = flat, len(buffer.parameters), False
        self._step = _Step(passes=passes)

    def finish(self) -> None:
        """Starts what has not been started, and returns when every rank has its own sums."""
        step = self._step
        assert step is not None, "begin() comes before the backward passes"
        for buffer in self._order[step.num_sent :]:
            self._send(buffer, step)
        while step.pending:
            step.pending.popleft().wait()
        self._step = None
        for buffer in self._buffers:
            buffer.flat = None

    def _note_arrival(self, parameter: nn.Parameter) -> None:
        """A backward pass has added its part to a gradient."""
        step, buffer = self._step, self._buffer_of[parameter]
        if step is None:
            return
        if buffer.is_sent:
            raise RuntimeError(
                f"a gradient of shape {tuple(parameter.shape)} grew after {step.passes} backward "
                "passes, when its reduction had begun"
            )
        count = step.arrivals.get(parameter, 0) + 1
        step.arrivals[parameter] = count
        buffer.missing -= count == step.passes
        while step.num_sent < len(self._order):
            following = self._order[step.num_sent]
            if following.missing or not following.may_start_early:
                break
            self._send(following, step)

    def _send(self, buffer: _Buffer, step: _Step) -> None:
        """Starts a buffer's reduction, after waiting for older ones that hold too much memory."""
        assert buffer.flat is not None, "begin() hands the buffers over"
        buffer.is_sent = True
        step.num_sent += 1
        while sum(each.staged_bytes for each in step.pending) > _STAGED_BYTES:
            step.pending.popleft().wait()
        step.pending.append(start_reduce_scatter(buffer.flat, self._group))


def own_gradients(
    parameters: Sequence[nn.Parameter], flat: Tensor, group: dist.ProcessGroup
) -> list[OwnGradient]:
    """The parts of gradients, one after the other in a flat buffer, that this data rank owns."""
    share = flat.numel() // group.size()
    first, last = share * group.rank(), share * (group.rank() + 1)
    found, start = [], 0
    for parameter in parameters:
        stop = start + parameter.numel()
        low, high = max(start, first), min(stop, last)
        if low < high:
            found.append(OwnGradient(parameter=parameter, value=flat[low:high]))
        start = stop
    return found


def _call(method: "weakref.WeakMethod[Any]", parameter: nn.Parameter) -> None:
    """Calls a method of an object that may be gone."""
    alive = method()
    if alive is not None:
        alive(parameter)
